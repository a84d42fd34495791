"""Linear layers of a CPU server by oneDNN.

A decode step has as many rows as requests. PyTorch gives float32 layers to MKL, which takes longer for 2 or 3 rows than
for 4, and for up to 12 longer than oneDNN: docs/performance.md has the times.
"""

from __future__ import annotations

import torch
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

STOCK_APPLY = UnquantizedLinearMethod.apply


def apply(
    self: UnquantizedLinearMethod, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`x @ layer.weight.T + bias` in the type of `x`, [..., in_features]; see `UnquantizedLinearMethod.apply`."""
    if x.dtype != torch.float32:
        # oneDNN refuses 16-bit types on older processors
        return STOCK_APPLY(self, layer, x, bias)
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, layer.weight, bias, "none", [], "")
    return y


def install() -> None:
    """Let every float32 linear layer without quantization compute by oneDNN, if this PyTorch has it."""
    if torch.backends.mkldnn.is_available():
        UnquantizedLinearMethod.apply = apply
