"""What stock SGLang and others offer instead: all KV in fewer bits, nothing dropped. Rounded, not stored, in them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bench.fidelity.attention import DenseCache
from bench.fidelity.model import ModelShape


@dataclass(frozen=True)
class Quantisation:
    """A number format of keys and values; integers have an offset and a scale per token and KV head."""

    held: float  # bytes over those of 16-bit KV, at a head size of 64 for integers
    float_type: torch.dtype | None = None
    bits: int = 0

    def round(self, rows: torch.Tensor) -> torch.Tensor:
        """The nearest value that the format holds, for rows [..., D]."""
        if self.float_type is not None:
            return rows.to(self.float_type).to(rows.dtype)
        low, high = rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True)
        scale = ((high - low) / (2**self.bits - 1)).clamp(min=1e-8)
        return ((rows - low) / scale).round() * scale + low


QUANTISATIONS = {
    "fp8_e4m3": Quantisation(0.5, torch.float8_e4m3fn),  # as `--kv-cache-dtype fp8_e4m3`, without scales
    "fp8_e5m2": Quantisation(0.5, torch.float8_e5m2),
    "int8": Quantisation(0.53, bits=8),
    "int4": Quantisation(0.28, bits=4),
}


class QuantisedCache(DenseCache):
    """A dense cache whose keys and values, the prompt's too, are rounded before anything attends them."""

    def __init__(self, shape: ModelShape, max_len: int, device: torch.device, quantisation: Quantisation) -> None:
        super().__init__(shape, max_len, device)
        self.quantisation = quantisation

    def stored(self, rows: torch.Tensor) -> torch.Tensor:
        """See `DenseCache.stored`."""
        return self.quantisation.round(rows)
