"""Joining attention states by sum of exponentials, in base 2: of the splits of one list, and of two tiers."""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl

from hardkv_sglang.kernels import EMPTY_LSE2

EMPTY = tl.constexpr(EMPTY_LSE2)

State = tuple[torch.Tensor, torch.Tensor]
"""Attention output `[B, HQ, D]` (normalised) and its `lse2` `[B, HQ]` float32, both contiguous."""


@triton.jit
def merge_pair(b_o, b_lse2, b_o_other, b_lse2_other):
    """Merge two states `[N, D]`, `[N]` in float32; an empty one changes nothing, two empty ones give zeros."""
    b_top = tl.maximum(b_lse2, b_lse2_other)
    b_w = tl.exp2(b_lse2 - b_top)
    b_w_other = tl.exp2(b_lse2_other - b_top)
    b_total = b_w + b_w_other
    # one division per row, not per element
    b_merged = b_o * (b_w / b_total)[:, None] + b_o_other * (b_w_other / b_total)[:, None]
    return b_merged, b_top + tl.log2(b_total)


@triton.jit
def reduce_splits(
    partial_o,
    partial_lse2,
    o_first,
    m_row,
    stride,
    num_splits,
    D: tl.constexpr,
    BN: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Merge partial states, in order: rows `o_first` ([BN] int64) of the first split, `stride` rows on for the next.

    Returns `[BN, D]` and `[BN]` in float32.
    """
    b_top = tl.full([BN], EMPTY, tl.float32)
    b_total = tl.zeros([BN], tl.float32)
    b_acc = tl.zeros([BN, D], tl.float32)
    for i_s in range(0, num_splits, UNROLL):
        # unrolled, so that all loads are in flight before the first is needed
        for i_u in tl.static_range(UNROLL):
            m_part = m_row & (i_s + i_u < num_splits)
            o_part = o_first + (i_s + i_u) * stride
            o_od = o_part[:, None] * D + tl.arange(0, D)[None, :]
            # other multiprocessors wrote these: read around the L1 cache
            b_lse2 = tl.load(partial_lse2 + o_part, mask=m_part, other=EMPTY, cache_modifier=".cg")
            b_o = tl.load(partial_o + o_od, mask=m_part[:, None], other=0.0, cache_modifier=".cg")
            b_new = tl.maximum(b_top, b_lse2)
            b_old, b_w = tl.exp2(b_top - b_new), tl.exp2(b_lse2 - b_new)
            b_total = b_total * b_old + b_w
            b_acc = b_acc * b_old[:, None] + b_o * b_w[:, None]
            b_top = b_new
    return b_acc * (1.0 / b_total)[:, None], b_top + tl.log2(b_total)


@triton.jit
def merge_into(b_o, b_lse2, o_row, m_row, o, lse2, D: tl.constexpr):
    """Merge states `[N, D]`, `[N]` into rows `o_row` (int64, each once) of those in memory."""
    o_od = o_row[:, None] * D + tl.arange(0, D)[None, :]
    b_o_there = tl.load(o + o_od, mask=m_row[:, None], other=0.0).to(tl.float32)
    b_lse2_there = tl.load(lse2 + o_row, mask=m_row, other=EMPTY)
    # no thread may write before all have read
    tl.debug_barrier()
    b_o, b_lse2 = merge_pair(b_o, b_lse2, b_o_there, b_lse2_there)
    tl.store(o + o_od, b_o.to(o.dtype.element_ty), mask=m_row[:, None])
    tl.store(lse2 + o_row, b_lse2, mask=m_row)


@triton.jit
def join_split(
    b_o,
    b_lse2,
    o,
    lse2,
    partial_o,
    partial_lse2,
    arrivals,
    i_item,
    i_list,
    first_item,
    num_splits,
    G: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BG: tl.constexpr,
):
    """Merge the state of one split, `[BM, D]`, into its list's in memory; of several, the last to arrive does it."""
    o_m = tl.arange(0, BM)
    m_m = o_m < G
    # query heads of a list are adjacent: head index h * G + g
    o_hq = i_list.to(tl.int64) * G
    if num_splits == 1:
        merge_into(b_o, b_lse2, o_hq + o_m, m_m, o, lse2, D)
    else:
        o_part = tl.cast(i_item, tl.int64) * G + o_m
        tl.store(partial_o + o_part[:, None] * D + tl.arange(0, D)[None, :], b_o, mask=m_m[:, None])
        tl.store(partial_lse2 + o_part, b_lse2, mask=m_m)
        # every thread's stores come before the release, which makes them visible to the last to arrive
        tl.debug_barrier()
        arrived = tl.atomic_add(arrivals + i_list, 1, sem="release")
        if arrived == num_splits - 1:
            tl.atomic_xchg(arrivals + i_list, 0, sem="acquire")
            tl.debug_barrier()
            o_g = tl.arange(0, BG)
            m_g = o_g < G
            o_first = first_item.to(tl.int64) * G + o_g
            b_o_list, b_lse2_list = reduce_splits(partial_o, partial_lse2, o_first, m_g, G, num_splits, D, BG, 8)
            merge_into(b_o_list, b_lse2_list, o_hq + o_g, m_g, o, lse2, D)
