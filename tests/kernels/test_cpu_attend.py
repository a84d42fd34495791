"""Attention by PyTorch's CPU kernel equals the torch definition."""

from __future__ import annotations

import pytest
import torch

from hardkv_sglang.kernels import reference
from hardkv_sglang.kernels.cpu_attend import attend

TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 5e-6}


@pytest.mark.parametrize("counts", [[0, 0], [0, 1], [31, 32], [33, 700], [1, 1]], ids=str)
@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_cpu_attend(counts: list[int], group: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(sum(counts) + group)
    H, N, D = len(counts), max(counts), 64
    q = (torch.randn(H * group, D, generator=g) * 3).to(dtype)
    k, v = (torch.randn(H, N, D, generator=g).to(dtype) for _ in range(2))
    lengths = torch.tensor(counts)
    o, lse2 = attend(q, k, v, lengths, 0.125)
    expected_o, expected_lse2 = reference.attend(q.double(), k.double(), v.double(), lengths, 0.125)
    assert o.dtype == lse2.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(o.double(), expected_o, rtol=0, atol=TOLERANCE[dtype])
    torch.testing.assert_close(lse2.double(), expected_lse2, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
