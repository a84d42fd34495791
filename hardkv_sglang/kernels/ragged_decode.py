"""Decode attention over the condensed and sparse lists of a batch: split-KV on a persistent grid.

Three kernels. `plan_ragged_decode`, once per step, cuts the lists of all layers into splits. `ragged_decode`, per
layer, runs a persistent grid over the splits, then merges the splits of each list, and the dense state if there
is one. The splits of a list depend on its length alone and are merged in order: results are bit-equal between
runs, and do not depend on what else is in the batch.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from hardkv_sglang.kernels.merge import EMPTY, State, merge_splits
from hardkv_sglang.kernels.ragged_plan import ITEM_FIELDS, RaggedWorkspace
from hardkv_sglang.memory_pool.layout import PoolLayout
from hardkv_sglang.memory_pool.tables import DeviceTables


@triton.jit
def load_item(items, i_item):
    """Fields of one work item: list, row, start, end, condensed tokens, first head page."""
    p_item = items + i_item * ITEM_FIELDS
    i_list, row, start = tl.load(p_item), tl.load(p_item + 1).to(tl.int64), tl.load(p_item + 2)
    return i_list, row, start, tl.load(p_item + 3), tl.load(p_item + 4), tl.load(p_item + 5)


@triton.jit
def head_page_row(i_n, end, first_page, p_pages, num_slots, H: tl.constexpr, COLUMNS: tl.constexpr, PS: tl.constexpr):
    """Storage row (int64) of condensed token `i_n`, a scalar; later rows of its page follow at stride H."""
    i_seq = first_page + i_n // PS
    page = tl.load(p_pages + i_seq // COLUMNS, mask=i_n < end, other=0).to(tl.int64)
    i_column = i_seq % COLUMNS
    return ((i_column // H) * num_slots + page * PS + i_n % PS) * H + i_column % H


@triton.jit
def sparse_rows(b_index, m_index, p_positions, p_slots, i_l, i_h, num_slots, H: tl.constexpr):
    """Storage rows (int64) of entries `b_index` of the sparse list of (i_l, i_h)."""
    b_position = tl.load(p_positions + b_index, mask=m_index, other=0)
    b_slot = tl.load(p_slots + b_position, mask=m_index, other=0).to(tl.int64)
    return (i_l * num_slots + b_slot) * H + i_h


@triton.jit
def attend_block(b_q, b_k, b_v, m_n, b_top, b_total, b_acc, scale_log2):
    """One step of the online softmax in base 2; masked tokens must come with finite K and V."""
    # [BM, D] @ [D, BN] -> [BM, BN]
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
    b_s = tl.where(m_n[None, :], b_s, EMPTY)
    b_new = tl.maximum(b_top, tl.max(b_s, 1) * scale_log2)
    b_old = tl.exp2(b_top - b_new)
    b_p = tl.exp2(b_s * scale_log2 - b_new[:, None])
    b_total = b_total * b_old + tl.sum(b_p, 1)
    # [BM, BN] @ [BN, D] -> [BM, D]
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_old[:, None], input_precision="ieee")
    return b_new, b_total, b_acc


@triton.jit(do_not_specialize=["i_l"])
def ragged_decode_kernel(
    q,
    k,
    v,
    items,
    split_indptr,
    partial_o,
    partial_lse2,
    condensed_pages,
    sparse_positions,
    req_to_token,
    scale_log2,
    i_l,
    num_lists,
    max_lists,
    max_items,
    num_rows,
    num_slots,
    max_pages,
    max_span,
    stride_q,
    stride_req,
    G: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    PS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    i_l = tl.cast(i_l, tl.int64)
    o_m = tl.arange(0, BM)
    o_n = tl.arange(0, BN)
    o_d = tl.arange(0, D)
    m_m = o_m < G
    BP: tl.constexpr = min(BN, PS)
    # [BN, D], rows of a head page lie H rows apart
    o_block = o_n[:, None] * (H * D) + o_d[None, :]
    num_items = tl.load(split_indptr + i_l * (max_lists + 1) + num_lists)
    # fields are read one item ahead, which may be a stale item past the last: a valid address, never used
    item = load_item(items, i_l * max_items + tl.program_id(0))
    for i_item in range(tl.program_id(0), num_items, tl.num_programs(0)):
        i_list, row, start, end, num_condensed, first_page = item
        item = load_item(items, i_l * max_items + tl.minimum(i_item + tl.num_programs(0), max_items - 1))
        i_b, i_h = (i_list // H).to(tl.int64), i_list % H
        p_pages = condensed_pages + row * max_pages
        b_top = tl.full([BM], EMPTY, tl.float32)
        b_total = tl.zeros([BM], tl.float32)
        b_acc = tl.zeros([BM, D], tl.float32)
        # Addresses are made one block ahead, so that the pipeliner only has to overlap the loads of K and V.
        # Unused memory may hold NaN: it must not be read even with weight zero.
        end_condensed = tl.minimum(end, num_condensed)
        i_row = head_page_row(start, end_condensed, first_page, p_pages, num_slots, H, COLUMNS, PS)
        i_row_next = head_page_row(start + BP, end_condensed, first_page, p_pages, num_slots, H, COLUMNS, PS)
        # [BM, D], the query group of this KV head, padded to one tensor-core tile
        p_q = q + i_b * stride_q + (i_h * G + o_m)[:, None] * D + o_d[None, :]
        b_q = tl.load(p_q, mask=m_m[:, None], other=0.0)
        for i_n in range(start, end_condensed, BN):
            m_n = i_n + o_n < end_condensed
            if BN > BP:
                o_kv = tl.where(o_n < BP, i_row, i_row_next - BP * H)[:, None] * D + o_block
            else:
                o_kv = i_row * D + o_block
            b_k = tl.load(k + o_kv, mask=m_n[:, None], other=0.0)
            b_v = tl.load(v + o_kv, mask=m_n[:, None], other=0.0)
            i_row = head_page_row(i_n + BN, end_condensed, first_page, p_pages, num_slots, H, COLUMNS, PS)
            if BN > BP:
                i_row_next = head_page_row(i_n + BN + BP, end_condensed, first_page, p_pages, num_slots, H, COLUMNS, PS)
            b_top, b_total, b_acc = attend_block(b_q, b_k, b_v, m_n, b_top, b_total, b_acc, scale_log2)
        start_sparse, end_sparse = tl.maximum(start - num_condensed, 0), end - num_condensed
        if start_sparse < end_sparse:
            p_positions = sparse_positions + ((i_l * num_rows + row) * H + i_h) * max_span
            p_slots = req_to_token + row * stride_req
            b_index = start_sparse + o_n
            b_row = sparse_rows(b_index, b_index < end_sparse, p_positions, p_slots, i_l, i_h, num_slots, H)
            for i_n in range(start_sparse, end_sparse, BN):
                m_n = i_n + o_n < end_sparse
                o_kv = b_row[:, None] * D + o_d[None, :]
                b_k = tl.load(k + o_kv, mask=m_n[:, None], other=0.0)
                b_v = tl.load(v + o_kv, mask=m_n[:, None], other=0.0)
                b_index = i_n + BN + o_n
                b_row = sparse_rows(b_index, b_index < end_sparse, p_positions, p_slots, i_l, i_h, num_slots, H)
                b_top, b_total, b_acc = attend_block(b_q, b_k, b_v, m_n, b_top, b_total, b_acc, scale_log2)
        # an item is never empty, so b_total is positive in every row of the tile
        o_part = tl.cast(i_item, tl.int64) * G + o_m
        b_o = b_acc * (1.0 / b_total)[:, None]
        tl.store(partial_o + o_part[:, None] * D + o_d[None, :], b_o, mask=m_m[:, None])
        tl.store(partial_lse2 + o_part, b_top + tl.log2(b_total), mask=m_m)


@dataclass(frozen=True)
class Tuning:
    """Launch parameters of the kernel; results depend on `block_tokens` only, and only in rounding."""

    block_tokens: int
    num_warps: int
    num_stages: int
    programs_per_multiprocessor: int

    @classmethod
    def default(cls, head_dim: int, element_size: int) -> Tuning:
        """Best measured on an H200 for a row of `head_dim * element_size` bytes."""
        if head_dim * element_size <= 256:
            return cls(block_tokens=32, num_warps=2, num_stages=3, programs_per_multiprocessor=9)
        return cls(block_tokens=32, num_warps=4, num_stages=2, programs_per_multiprocessor=4)


def ragged_decode(
    workspace: RaggedWorkspace,
    layout: PoolLayout,
    tables: DeviceTables,
    req_to_token: torch.Tensor,
    k_storage: torch.Tensor,
    v_storage: torch.Tensor,
    layer: int,
    q: torch.Tensor,
    scale: float,
    out: State,
    dense: State | None = None,
    tuning: Tuning | None = None,
) -> None:
    """Attention of one query token per request over its condensed and sparse lists, merged with `dense`.

    The rows of the batch are those of the last `plan_ragged_decode` on this workspace, with the same batch size;
    changed counts need a new plan.

    req_to_token: [R, T] integer slots; k_storage, v_storage: [L, S, H, D] contiguous, the whole pool; q: [B, HQ, D],
    D 64, 128 or 256, strided in B at most; out: (o [B, HQ, D], any float dtype, lse2 [B, HQ] float32) to write;
    dense: such a state over other tokens, may be `out` itself.
    Guarantees: two launches, graph-safe, no allocation, no sync; deterministic; float32 accumulation. A request
    without listed tokens gets zeros and `EMPTY_LSE2`, or bit by bit its dense state.
    """
    B, HQ, D = q.shape
    H = layout.num_kv_heads
    for state in (out, dense or out):
        assert state[0].is_contiguous() and state[1].is_contiguous(), "states must be contiguous"
        assert state[0].shape == q.shape and state[1].dtype == torch.float32, "o: shape of q; lse2: float32"
    assert k_storage.is_contiguous() and v_storage.is_contiguous(), "the pool must be contiguous"
    assert q.stride(2) == 1 and q.stride(1) == D and D in (64, 128, 256), "q must be [B, HQ, D], D 64, 128 or 256"
    assert q.dtype == k_storage.dtype == v_storage.dtype, "q and the pool must have one dtype"
    assert tables.condensed_pages.is_contiguous() and tables.sparse_positions.is_contiguous(), "tables: contiguous"
    assert req_to_token.stride(1) == 1 and workspace.max_lists >= B * H, "batch exceeds the workspace"
    tuning = tuning or Tuning.default(D, q.element_size())
    programs = workspace.num_multiprocessors * tuning.programs_per_multiprocessor
    ragged_decode_kernel[(min(programs, B * H * workspace.max_splits),)](
        q,
        k_storage,
        v_storage,
        workspace.items,
        workspace.split_indptr,
        workspace.partial_o,
        workspace.partial_lse2,
        tables.condensed_pages,
        tables.sparse_positions,
        req_to_token,
        scale_log2=scale * math.log2(math.e),
        i_l=layer,
        num_lists=B * H,
        max_lists=workspace.max_lists,
        max_items=workspace.items.shape[1],
        num_rows=tables.num_condensed.shape[1],
        num_slots=layout.num_slots,
        max_pages=tables.condensed_pages.shape[1],
        max_span=tables.sparse_positions.shape[-1],
        stride_q=q.stride(0),
        stride_req=req_to_token.stride(0),
        G=HQ // H,
        H=H,
        D=D,
        COLUMNS=layout.columns,
        PS=layout.page_size,
        BM=max(16, triton.next_power_of_2(HQ // H)),
        BN=min(tuning.block_tokens, 2 * layout.page_size),
        num_warps=tuning.num_warps,
        num_stages=tuning.num_stages,
    )
    merge_splits(workspace, layer, out, dense)
