"""`merge_pair`, which joins a list with the dense tiers, in a kernel of its own against its reference."""

# mypy: allow-untyped-defs
from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from hardkv_sglang.kernels import EMPTY_LSE2, reference
from hardkv_sglang.kernels.merge import State, merge_pair

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@triton.jit
def merge_states_kernel(o_a, lse2_a, o_b, lse2_b, o, lse2, num_rows, D: tl.constexpr, BN: tl.constexpr):
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    m_n = o_n < num_rows
    o_nd = o_n[:, None] * D + tl.arange(0, D)[None, :]
    b_o_a = tl.load(o_a + o_nd, mask=m_n[:, None], other=0.0).to(tl.float32)
    b_o_b = tl.load(o_b + o_nd, mask=m_n[:, None], other=0.0).to(tl.float32)
    b_lse2_a = tl.load(lse2_a + o_n, mask=m_n, other=0.0)
    b_lse2_b = tl.load(lse2_b + o_n, mask=m_n, other=0.0)
    b_o, b_lse2 = merge_pair(b_o_a, b_lse2_a, b_o_b, b_lse2_b)
    tl.store(o + o_nd, b_o.to(o.dtype.element_ty), mask=m_n[:, None])
    tl.store(lse2 + o_n, b_lse2, mask=m_n)


def merge_states(a: State, b: State) -> State:
    (o_a, lse2_a), (o_b, lse2_b) = a, b
    o, lse2 = torch.full_like(o_a, torch.nan), torch.full_like(lse2_a, torch.nan)
    num_rows, rows_per_program = lse2.numel(), 8
    merge_states_kernel[(triton.cdiv(num_rows, rows_per_program),)](
        o_a, lse2_a, o_b, lse2_b, o, lse2, num_rows, D=o.shape[-1], BN=rows_per_program
    )
    return o, lse2


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 64), (3, 9, 64), (5, 8, 128), (2, 4, 256)], ids=str)
def test_merge_states(device: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    o_a, o_b = (torch.randn(shape, generator=g).to(dtype).to(device) for _ in range(2))
    lse2_a, lse2_b = ((10 * torch.randn(shape[:2], generator=g)).to(device) for _ in range(2))
    lse2_a[0, 0] = 1.0e4  # a state that outweighs the other by far
    o, lse2 = merge_states((o_a, lse2_a), (o_b, lse2_b))
    want_o, want_lse2 = reference.merge_states((o_a.double(), lse2_a.double()), (o_b.double(), lse2_b.double()))
    assert (o.double() - want_o).norm() <= TOLERANCE[dtype] * want_o.norm()
    torch.testing.assert_close(lse2.double(), want_lse2, rtol=1e-6, atol=1e-5)


def test_merge_states_empty(device: str) -> None:
    """An empty state changes no bit; two empty states give zeros."""
    o_a = torch.randn(2, 4, 64, device=device)
    lse2_a = torch.randn(2, 4, device=device)
    o_b, lse2_b = torch.zeros_like(o_a), torch.full_like(lse2_a, EMPTY_LSE2)
    o_a[1], lse2_a[1] = 0, EMPTY_LSE2
    o, lse2 = merge_states((o_a, lse2_a), (o_b, lse2_b))
    assert torch.equal(o, o_a)
    assert torch.equal(lse2, lse2_a)
