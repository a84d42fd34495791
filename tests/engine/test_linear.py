"""Linear layers of our CPU platform equal PyTorch's."""

from __future__ import annotations

import pytest
import torch
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

from hardkv_sglang.engine.platform import linear
from hardkv_sglang.engine.platform.cpu import TorchCpuPlatform

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}


@pytest.mark.parametrize("shape", [(0, 96), (1, 96), (3, 96), (33, 96), (2, 5, 96)], ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_layer(shape: tuple[int, ...], has_bias: bool, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(96, 160, dtype=dtype)
    x = torch.randn(shape, generator=g).to(dtype)
    bias = torch.randn(160, generator=g).to(dtype) if has_bias else None
    y = linear.apply(UnquantizedLinearMethod(), layer, x, bias)
    expected = torch.nn.functional.linear(
        x.double(), layer.weight.double(), bias.double() if bias is not None else None
    )
    assert y.shape == (*shape[:-1], 160) and y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=TOLERANCE[dtype])


def test_rows_that_are_a_part_of_a_larger_tensor() -> None:
    layer = torch.nn.Linear(96, 160)
    x = torch.randn(5, 300)[:, 100:196]
    y = linear.apply(UnquantizedLinearMethod(), layer, x)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, layer.weight), rtol=0, atol=1e-4)


def test_the_platform_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(UnquantizedLinearMethod, "apply", linear.STOCK_APPLY)
    TorchCpuPlatform().init_backend()
    assert UnquantizedLinearMethod.apply is linear.apply
