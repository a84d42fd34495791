"""`merge_states` against its reference."""

from __future__ import annotations

import pytest
import torch

from hardkv_sglang.kernels import EMPTY_LSE2, reference
from hardkv_sglang.kernels.merge import merge_states

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 64), (3, 9, 64), (5, 8, 128), (2, 4, 256)], ids=str)
def test_merge_states(device: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    o_a, o_b = (torch.randn(shape, generator=g).to(dtype).to(device) for _ in range(2))
    lse2_a, lse2_b = ((10 * torch.randn(shape[:2], generator=g)).to(device) for _ in range(2))
    lse2_a[0, 0] = 1.0e4  # a state that outweighs the other by far
    o = torch.full(shape, torch.nan, dtype=dtype, device=device)
    lse2 = torch.full(shape[:2], torch.nan, device=device)
    merge_states((o_a, lse2_a), (o_b, lse2_b), (o, lse2))
    want_o, want_lse2 = reference.merge_states((o_a.double(), lse2_a.double()), (o_b.double(), lse2_b.double()))
    assert (o.double() - want_o).norm() <= TOLERANCE[dtype] * want_o.norm()
    torch.testing.assert_close(lse2.double(), want_lse2, rtol=1e-6, atol=1e-5)


def test_merge_states_empty(device: str) -> None:
    """An empty state changes no bit; two empty states give zeros; the output may be an input."""
    o_a = torch.randn(2, 4, 64, device=device)
    lse2_a = torch.randn(2, 4, device=device)
    o_b, lse2_b = torch.zeros_like(o_a), torch.full_like(lse2_a, EMPTY_LSE2)
    o_a[1], lse2_a[1] = 0, EMPTY_LSE2
    want_o, want_lse2 = o_a.clone(), lse2_a.clone()
    merge_states((o_a, lse2_a), (o_b, lse2_b), (o_a, lse2_a))
    assert torch.equal(o_a, want_o)
    assert torch.equal(lse2_a, want_lse2)
