"""Joining attention states by sum of exponentials, in base 2: of the splits of one list, and of two tiers."""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl

from hardkv_sglang.kernels import EMPTY_LSE2
from hardkv_sglang.kernels.ragged_plan import RaggedWorkspace

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


@triton.jit(do_not_specialize=["i_l"])
def merge_splits_kernel(
    partial_o,
    partial_lse2,
    split_indptr,
    o_dense,
    lse2_dense,
    o,
    lse2,
    i_l,
    max_lists,
    G: tl.constexpr,
    D: tl.constexpr,
    BG: tl.constexpr,
    BS: tl.constexpr,
    HAS_DENSE: tl.constexpr,
):
    i_list = tl.program_id(0).to(tl.int64)
    p_indptr = split_indptr + tl.cast(i_l, tl.int64) * (max_lists + 1) + i_list
    first, end = tl.load(p_indptr), tl.load(p_indptr + 1)
    o_g = tl.arange(0, BG)
    o_d = tl.arange(0, D)
    m_g = o_g < G
    b_top = tl.full([BG], EMPTY, tl.float32)
    b_total = tl.zeros([BG], tl.float32)
    b_acc = tl.zeros([BG, D], tl.float32)
    for i_s in range(first, end, BS):
        # [BS, BG] rows of the partial results
        o_s = (i_s + tl.arange(0, BS)).to(tl.int64)[:, None]
        m_s = (o_s < end) & m_g[None, :]
        o_row = o_s * G + o_g[None, :]
        b_lse2 = tl.load(partial_lse2 + o_row, mask=m_s, other=EMPTY)
        p_o = partial_o + o_row[:, :, None] * D + o_d[None, None, :]
        b_o = tl.load(p_o, mask=m_s[:, :, None], other=0.0)
        b_new = tl.maximum(b_top, tl.max(b_lse2, 0))
        b_old = tl.exp2(b_top - b_new)
        b_w = tl.where(m_s, tl.exp2(b_lse2 - b_new[None, :]), 0.0)
        b_total = b_total * b_old + tl.sum(b_w, 0)
        # [BS, BG, D] -> [BG, D]
        b_acc = b_acc * b_old[:, None] + tl.sum(b_o * b_w[:, :, None], 0)
        b_top = b_new
    # a list is empty by its length, whatever its partial results
    b_total = tl.where(m_g & (end > first), b_total, 1.0)
    b_o_list = b_acc * (1.0 / b_total)[:, None]
    b_lse2_list = b_top + tl.log2(b_total)
    # query heads of a list are adjacent: head index h * G + g
    o_hq = i_list * G + o_g
    o_od = o_hq[:, None] * D + o_d[None, :]
    if HAS_DENSE:
        b_o_dense = tl.load(o_dense + o_od, mask=m_g[:, None], other=0.0).to(tl.float32)
        b_lse2_dense = tl.load(lse2_dense + o_hq, mask=m_g, other=EMPTY)
        b_o_list, b_lse2_list = merge_pair(b_o_list, b_lse2_list, b_o_dense, b_lse2_dense)
    tl.store(o + o_od, b_o_list.to(o.dtype.element_ty), mask=m_g[:, None])
    tl.store(lse2 + o_hq, b_lse2_list, mask=m_g)


def merge_splits(workspace: RaggedWorkspace, layer: int, out: State, dense: State | None) -> None:
    """Merge the partial results of one layer's lists, and the dense state if there is one, into `out`.

    out: state to write, any float dtype; dense: state over other tokens, may be `out` itself.
    Guarantees: one launch, no allocation, no sync; splits are summed in list order.
    """
    o, lse2 = out
    o_dense, lse2_dense = out if dense is None else dense
    B, HQ, D = o.shape
    G = workspace.partial_o.shape[1]
    merge_splits_kernel[(B * HQ // G,)](
        workspace.partial_o,
        workspace.partial_lse2,
        workspace.split_indptr,
        o_dense,
        lse2_dense,
        o,
        lse2,
        i_l=layer,
        max_lists=workspace.max_lists,
        G=G,
        D=D,
        BG=triton.next_power_of_2(G),
        BS=8,
        HAS_DENSE=dense is not None,
        num_warps=4,
    )


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
    # [BN, D] offsets
    o_nd = o_n[:, None] * D + tl.arange(0, D)[None, :]
    b_o_a = tl.load(o_a + o_nd, mask=m_n[:, None], other=0.0).to(tl.float32)
    b_o_b = tl.load(o_b + o_nd, mask=m_n[:, None], other=0.0).to(tl.float32)
    b_lse2_a = tl.load(lse2_a + o_n, mask=m_n, other=EMPTY)
    b_lse2_b = tl.load(lse2_b + o_n, mask=m_n, other=EMPTY)
    b_o, b_lse2 = merge_pair(b_o_a, b_lse2_a, b_o_b, b_lse2_b)
    tl.store(o + o_nd, b_o.to(o.dtype.element_ty), mask=m_n[:, None])
    tl.store(lse2 + o_n, b_lse2, mask=m_n)


def merge_states(a: State, b: State, out: State) -> None:
    """Merge two attention states over disjoint token sets into `out`, which may be one of them.

    D must be a power of two. Guarantees: computed in float32; one launch, no allocation, no sync; an empty state
    changes no bit, two give zeros.
    """
    (o_a, lse2_a), (o_b, lse2_b), (o, lse2) = a, b, out
    assert o_a.is_contiguous() and o_b.is_contiguous() and o.is_contiguous(), "states must be contiguous"
    assert lse2_a.is_contiguous() and lse2_b.is_contiguous() and lse2.is_contiguous(), "lse2 must be contiguous"
    assert lse2_a.dtype == lse2_b.dtype == lse2.dtype == torch.float32, "lse2 must be float32"
    B, HQ, D = o.shape
    num_rows, rows_per_program = B * HQ, 8
    merge_states_kernel[(triton.cdiv(num_rows, rows_per_program),)](
        o_a, lse2_a, o_b, lse2_b, o, lse2, num_rows, D=D, BN=rows_per_program, num_warps=4
    )
