"""Joining attention states by sum of exponentials, in base 2: of the splits of one list, and of two tiers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hardkv_sglang.kernels import EMPTY_LSE2

EMPTY = tl.constexpr(EMPTY_LSE2)


@triton.jit
def merge_pair(b_o, b_lse2, b_o_other, b_lse2_other):
    """Merge two states `[N, D]`, `[N]` in float32; two empty states give zeros and a value near `EMPTY_LSE2`."""
    b_top = tl.maximum(b_lse2, b_lse2_other)
    b_w = tl.exp2(b_lse2 - b_top)
    b_w_other = tl.exp2(b_lse2_other - b_top)
    b_total = b_w + b_w_other
    # shape [N, D]
    b_merged = (b_o * b_w[:, None] + b_o_other * b_w_other[:, None]) / b_total[:, None]
    return b_merged, b_top + tl.log2(b_total)


@triton.jit
def reduce_splits(
    partial_o,
    partial_lse2,
    i_first,
    num_splits,
    G: tl.constexpr,
    D: tl.constexpr,
    BG: tl.constexpr,
    BS: tl.constexpr,
):
    """Merge the `num_splits >= 1` partial states of one list; returns `[BG, D]` and `[BG]` in float32.

    The order of summation depends on `num_splits` alone.
    """
    o_g = tl.arange(0, BG)
    o_d = tl.arange(0, D)
    b_top = tl.full([BG], EMPTY, tl.float32)
    b_total = tl.zeros([BG], tl.float32)
    b_acc = tl.zeros([BG, D], tl.float32)
    for i_s in range(0, num_splits, BS):
        o_s = i_s + tl.arange(0, BS)
        # shape [BS, BG]
        m_s = (o_s < num_splits)[:, None] & (o_g < G)[None, :]
        o_row = (i_first + o_s).to(tl.int64)[:, None] * G + o_g[None, :]
        # other splits ran on other multiprocessors: read around the L1 cache
        b_lse2 = tl.load(partial_lse2 + o_row, mask=m_s, other=EMPTY, cache_modifier=".cg")
        # shape [BS, BG, D]
        b_o = tl.load(
            partial_o + o_row[:, :, None] * D + o_d[None, None, :],
            mask=m_s[:, :, None],
            other=0.0,
            cache_modifier=".cg",
        )
        b_new = tl.maximum(b_top, tl.max(b_lse2, 0))
        b_old = tl.exp2(b_top - b_new)
        # shape [BS, BG]
        b_w = tl.where(m_s, tl.exp2(b_lse2 - b_new[None, :]), 0.0)
        b_total = b_total * b_old + tl.sum(b_w, 0)
        b_acc = b_acc * b_old[:, None] + tl.sum(b_o * b_w[:, :, None], 0)
        b_top = b_new
    b_total = tl.where(o_g < G, b_total, 1.0)
    return b_acc / b_total[:, None], b_top + tl.log2(b_total)


@triton.jit
def merge_states_kernel(
    o_a,
    lse2_a,
    o_b,
    lse2_b,
    o,
    lse2,
    num_rows,
    D: tl.constexpr,
    BN: tl.constexpr,
):
    o_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    m_n = o_n < num_rows
    # shape [BN, D]
    o_nd = o_n[:, None] * D + tl.arange(0, D)[None, :]
    b_o_a = tl.load(o_a + o_nd, mask=m_n[:, None], other=0.0).to(tl.float32)
    b_o_b = tl.load(o_b + o_nd, mask=m_n[:, None], other=0.0).to(tl.float32)
    b_lse2_a = tl.load(lse2_a + o_n, mask=m_n, other=EMPTY)
    b_lse2_b = tl.load(lse2_b + o_n, mask=m_n, other=EMPTY)
    b_o, b_lse2 = merge_pair(b_o_a, b_lse2_a, b_o_b, b_lse2_b)
    tl.store(o + o_nd, b_o.to(o.dtype.element_ty), mask=m_n[:, None])
    tl.store(lse2 + o_n, b_lse2, mask=m_n)


def merge_states(
    o_a: torch.Tensor,
    lse2_a: torch.Tensor,
    o_b: torch.Tensor,
    lse2_b: torch.Tensor,
    o: torch.Tensor,
    lse2: torch.Tensor,
) -> None:
    """Merge two attention states over disjoint token sets into `o`, `lse2` (which may be one of the inputs).

    o_a, o_b, o: [B, HQ, D] contiguous, D a power of two; lse2_a, lse2_b, lse2: [B, HQ] float32.
    Guarantees: computed in float32; no allocation, no sync; an empty state changes nothing, two give zeros.
    """
    assert o_a.is_contiguous() and o_b.is_contiguous() and o.is_contiguous(), "states must be contiguous"
    assert lse2_a.is_contiguous() and lse2_b.is_contiguous() and lse2.is_contiguous(), (
        "lse2 must be contiguous"
    )
    assert lse2_a.dtype == lse2_b.dtype == lse2.dtype == torch.float32, "lse2 must be float32"
    B, HQ, D = o.shape
    num_rows, rows_per_program = B * HQ, 8
    merge_states_kernel[(triton.cdiv(num_rows, rows_per_program),)](
        o_a, lse2_a, o_b, lse2_b, o, lse2, num_rows, D=D, BN=rows_per_program, num_warps=4
    )
