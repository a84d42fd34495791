"""Decode attention over the condensed and sparse lists of a batch: split-KV on a persistent grid.

`plan_ragged_decode`, once per step, cuts the lists of all layers into splits. `ragged_decode`, one launch per
layer, runs a persistent grid over them; the program that finishes a list last merges its splits into the state of the
other tiers. Splits are merged in order, whoever does it: the same batch gives the same bits. With fixed
splits and one `Tuning` a request's results do not depend on what else is in the batch.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from hardkv_sglang.kernels.dependent_launch import launch_options, wait_for_previous
from hardkv_sglang.kernels.merge import EMPTY, State, join_split
from hardkv_sglang.kernels.ragged_plan import load_item
from hardkv_sglang.kernels.ragged_workspace import RaggedWorkspace, Tuning
from hardkv_sglang.memory_pool.layout import PoolLayout
from hardkv_sglang.memory_pool.tables import DeviceTables


@triton.jit
def load_page(i_n, end, first_page, p_pages, COLUMNS: tl.constexpr, PS: tl.constexpr):
    """Token page that holds condensed token `i_n`, a scalar; 0 at or past `end`."""
    return tl.load(p_pages + (first_page + i_n // PS) // COLUMNS, mask=i_n < end, other=0)


@triton.jit
def page_row(page, i_n, first_page, num_slots, H: tl.constexpr, COLUMNS: tl.constexpr, PS: tl.constexpr):
    """Storage row (int64) of condensed token `i_n`; the rest of its head page follows at stride H."""
    i_column = (first_page + i_n // PS) % COLUMNS
    return ((i_column // H).to(tl.int64) * num_slots + page.to(tl.int64) * PS + i_n % PS) * H + i_column % H


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
    o,
    lse2,
    items,
    num_items,
    partial_o,
    partial_lse2,
    arrivals,
    condensed_pages,
    sparse_positions,
    req_to_token,
    scale_log2,
    i_l,
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
    BG: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        wait_for_previous()
    i_l = tl.cast(i_l, tl.int64)
    o_m = tl.arange(0, BM)
    o_n = tl.arange(0, BN)
    o_d = tl.arange(0, D)
    m_m = o_m < G
    BP: tl.constexpr = min(BN, PS)
    # [BN, D], rows of a head page lie H rows apart
    o_block = o_n[:, None] * (H * D) + o_d[None, :]
    # fields are read one item ahead, which may be a stale item past the last: a valid address, never used
    item = load_item(items, i_l * max_items + tl.program_id(0))
    for i_item in range(tl.program_id(0), tl.load(num_items + i_l), tl.num_programs(0)):
        i_list, row, start, end, num_condensed, first_page, first_item, num_splits = item
        item = load_item(items, i_l * max_items + tl.minimum(i_item + tl.num_programs(0), max_items - 1))
        i_b, i_h = (i_list // H).to(tl.int64), i_list % H
        p_pages = condensed_pages + row * max_pages
        p_positions = sparse_positions + ((i_l * num_rows + row) * H + i_h) * max_span
        p_slots = req_to_token + row * stride_req
        b_top = tl.full([BM], EMPTY, tl.float32)
        b_total = tl.zeros([BM], tl.float32)
        b_acc = tl.zeros([BM, D], tl.float32)
        end_condensed = tl.minimum(end, num_condensed)
        start_sparse, end_sparse = tl.maximum(start - num_condensed, 0), end - num_condensed
        # Pages, positions and slots are loaded one block before their use, so that no block waits for them
        # and the pipeliner has to overlap only the loads of K and V.
        b_index = start_sparse + o_n
        b_position = tl.load(p_positions + b_index, mask=b_index < end_sparse, other=0)
        page = load_page(start, end_condensed, first_page, p_pages, COLUMNS, PS)
        page_next = load_page(start + BP, end_condensed, first_page, p_pages, COLUMNS, PS)
        # [BM, D], the query group of this KV head, padded to one tensor-core tile
        p_q = q + i_b * stride_q + (i_h * G + o_m)[:, None] * D + o_d[None, :]
        b_q = tl.load(p_q, mask=m_m[:, None], other=0.0)
        b_slot = tl.load(p_slots + b_position, mask=b_index < end_sparse, other=0)
        for i_n in range(start, end_condensed, BN):
            # unused memory may hold NaN: it must not be read even with weight zero
            m_n = i_n + o_n < end_condensed
            i_row = page_row(page, i_n, first_page, num_slots, H, COLUMNS, PS)
            if BN > BP:
                i_row_next = page_row(page_next, i_n + BP, first_page, num_slots, H, COLUMNS, PS) - BP * H
                o_kv = tl.where(o_n < BP, i_row, i_row_next)[:, None] * D + o_block
            else:
                o_kv = i_row * D + o_block
            b_k = tl.load(k + o_kv, mask=m_n[:, None], other=0.0)
            b_v = tl.load(v + o_kv, mask=m_n[:, None], other=0.0)
            page = load_page(i_n + BN, end_condensed, first_page, p_pages, COLUMNS, PS)
            if BN > BP:
                page_next = load_page(i_n + BN + BP, end_condensed, first_page, p_pages, COLUMNS, PS)
            b_top, b_total, b_acc = attend_block(b_q, b_k, b_v, m_n, b_top, b_total, b_acc, scale_log2)
        if start_sparse < end_sparse:
            b_index += BN
            b_position = tl.load(p_positions + b_index, mask=b_index < end_sparse, other=0)
            for i_n in range(start_sparse, end_sparse, BN):
                m_n = i_n + o_n < end_sparse
                b_row = (i_l * num_slots + b_slot) * H + i_h
                o_kv = b_row[:, None] * D + o_d[None, :]
                b_k = tl.load(k + o_kv, mask=m_n[:, None], other=0.0)
                b_v = tl.load(v + o_kv, mask=m_n[:, None], other=0.0)
                b_index = i_n + BN + o_n
                b_slot = tl.load(p_slots + b_position, mask=b_index < end_sparse, other=0)
                b_index += BN
                b_position = tl.load(p_positions + b_index, mask=b_index < end_sparse, other=0)
                b_top, b_total, b_acc = attend_block(b_q, b_k, b_v, m_n, b_top, b_total, b_acc, scale_log2)
        b_o = b_acc * (1.0 / b_total)[:, None]
        b_lse2 = b_top + tl.log2(b_total)
        join_split(
            b_o, b_lse2, o, lse2, partial_o, partial_lse2, arrivals,
            i_item, i_list, first_item, num_splits, G, D, BM, BG,
        )  # fmt: skip


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
    state: State,
    tuning: Tuning | None = None,
) -> None:
    """Merge the attention of one query token per request over its condensed and sparse lists into `state`.

    The rows of the batch are those of the last `plan_ragged_decode` on this workspace, with the same batch size;
    changed counts need a new plan.

    req_to_token: [R, T] integer slots; k_storage, v_storage: [L, S, H, D] contiguous, the whole pool; q: [B, HQ, D],
    D 64, 128 or 256, strided in B at most; state: (o [B, HQ, D], any float dtype, lse2 [B, HQ] float32) over the other
    tokens, zeros and `EMPTY_LSE2` if there are none.
    tuning: launch parameters; by default they depend on B, so pass one for bits that do not.
    Guarantees: one launch, graph-safe, no allocation, no sync; deterministic; float32 accumulation. The
    state of a request without listed tokens is not touched.
    """
    B, HQ, D = q.shape
    H = layout.num_kv_heads
    assert state[0].is_contiguous() and state[1].is_contiguous(), "the state must be contiguous"
    assert state[0].shape == q.shape and state[1].dtype == torch.float32, "o: shape of q; lse2: float32"
    assert k_storage.is_contiguous() and v_storage.is_contiguous(), "the pool must be contiguous"
    assert q.stride(2) == 1 and q.stride(1) == D and D in (64, 128, 256), "q must be [B, HQ, D], D 64, 128 or 256"
    assert q.dtype == k_storage.dtype == v_storage.dtype, "q and the pool must have one dtype"
    assert tables.condensed_pages.is_contiguous() and tables.sparse_positions.is_contiguous(), "tables: contiguous"
    assert req_to_token.stride(1) == 1 and workspace.max_lists >= B * H, "batch exceeds the workspace"
    tuning = tuning or Tuning.default(D * q.element_size(), B * H, workspace.num_multiprocessors)
    programs = workspace.num_multiprocessors * tuning.programs_per_multiprocessor
    ragged_decode_kernel[(min(programs, B * H * workspace.max_splits),)](
        q,
        k_storage,
        v_storage,
        *state,
        workspace.items,
        workspace.num_items,
        workspace.partial_o,
        workspace.partial_lse2,
        workspace.arrivals,
        tables.condensed_pages,
        tables.sparse_positions,
        req_to_token,
        scale_log2=scale * math.log2(math.e),
        i_l=layer,
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
        BG=triton.next_power_of_2(HQ // H),
        num_warps=tuning.num_warps,
        num_stages=tuning.num_stages,
        **launch_options(q.device),
    )
