"""Decode attention over the condensed and sparse lists of a batch: one persistent split-KV launch per layer.

`plan_ragged_decode` (once per step) cuts the lists into splits. The program that finishes a list last merges
its splits, in list order, and the dense state if there is one: results are bit-equal between runs and do not
depend on what else is in the batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from hardkv_sglang.kernels.merge import EMPTY, merge_pair, reduce_splits
from hardkv_sglang.kernels.ragged_plan import ITEM_FIELDS, RaggedWorkspace
from hardkv_sglang.memory_pool.layout import PoolLayout
from hardkv_sglang.memory_pool.tables import DeviceTables


@triton.jit
def list_rows(
    b_index,
    end,
    num_condensed,
    first_page,
    p_pages,
    p_positions,
    p_slots,
    i_l,
    i_h,
    num_slots,
    H: tl.constexpr,
    COLUMNS: tl.constexpr,
    PS: tl.constexpr,
):
    """Storage rows (int64) of the tokens `b_index` of list (i_l, i_h): condensed tokens first, then sparse.

    Rows of tokens at or past `end` are arbitrary.
    """
    m_condensed = b_index < num_condensed
    b_seq = first_page + b_index // PS
    b_column = b_seq % COLUMNS
    b_page = tl.load(p_pages + b_seq // COLUMNS, mask=m_condensed & (b_index < end), other=0)
    m_sparse = (b_index >= num_condensed) & (b_index < end)
    b_position = tl.load(p_positions + (b_index - num_condensed), mask=m_sparse, other=0)
    b_dense_slot = tl.load(p_slots + b_position, mask=m_sparse, other=0)
    b_slot = tl.where(m_condensed, b_page * PS + b_index % PS, b_dense_slot.to(tl.int32))
    b_layer = tl.where(m_condensed, b_column // H, i_l)
    b_head = tl.where(m_condensed, b_column % H, i_h)
    return (b_layer.to(tl.int64) * num_slots + b_slot) * H + b_head


@triton.jit
def store_state(
    b_o,
    b_lse2,
    i_list,
    o,
    lse2,
    o_dense,
    lse2_dense,
    G: tl.constexpr,
    D: tl.constexpr,
    BG: tl.constexpr,
    HAS_DENSE: tl.constexpr,
):
    """Write the final state `[BG, D]`, `[BG]` of one list, merged with the dense tier if there is one."""
    o_g = tl.arange(0, BG)
    m_g = o_g < G
    # query heads of a list are adjacent: head index h * G + g
    o_hq = i_list.to(tl.int64) * G + o_g
    # shape [BG, D]
    o_od = o_hq[:, None] * D + tl.arange(0, D)[None, :]
    if HAS_DENSE:
        b_o_dense = tl.load(o_dense + o_od, mask=m_g[:, None], other=0.0).to(tl.float32)
        b_lse2_dense = tl.load(lse2_dense + o_hq, mask=m_g, other=EMPTY)
        b_o, b_lse2 = merge_pair(b_o, b_lse2, b_o_dense, b_lse2_dense)
    tl.store(o + o_od, b_o.to(o.dtype.element_ty), mask=m_g[:, None])
    tl.store(lse2 + o_hq, b_lse2, mask=m_g)


@triton.jit(do_not_specialize=["i_l"])
def ragged_decode_kernel(
    q,
    k,
    v,
    o,
    lse2,
    o_dense,
    lse2_dense,
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
    BS: tl.constexpr,
    HAS_DENSE: tl.constexpr,
):
    i_l = tl.cast(i_l, tl.int64)
    o_m = tl.arange(0, BM)
    o_n = tl.arange(0, BN)
    o_d = tl.arange(0, D)
    m_m = o_m < G
    for i_item in range(tl.program_id(0), tl.load(num_items + i_l), tl.num_programs(0)):
        p_item = items + (i_l * max_items + i_item) * ITEM_FIELDS
        i_list = tl.load(p_item)
        row = tl.load(p_item + 1).to(tl.int64)
        start = tl.load(p_item + 2)
        end = tl.load(p_item + 3)
        num_condensed = tl.load(p_item + 4)
        first_page = tl.load(p_item + 5)
        i_b, i_h = (i_list // H).to(tl.int64), i_list % H
        p_pages = condensed_pages + row * max_pages
        p_positions = sparse_positions + ((i_l * num_rows + row) * H + i_h) * max_span
        p_slots = req_to_token + row * stride_req
        # shape [BM, D], the query group of this KV head, padded to one tensor-core tile
        p_q = q + i_b * stride_q + (i_h * G + o_m)[:, None] * D + o_d[None, :]
        b_q = tl.load(p_q, mask=m_m[:, None], other=0.0)
        b_top = tl.full([BM], EMPTY, tl.float32)
        b_total = tl.zeros([BM], tl.float32)
        b_acc = tl.zeros([BM, D], tl.float32)
        b_row = list_rows(
            start + o_n, end, num_condensed, first_page, p_pages, p_positions, p_slots, i_l, i_h, num_slots,
            H, COLUMNS, PS,
        )  # fmt: skip
        for i_n in range(start, end, BN):
            # shape [BN, D]; unused memory may hold NaN, so it must not be read even with weight zero
            m_n = i_n + o_n < end
            o_kv = b_row[:, None] * D + o_d[None, :]
            b_k = tl.load(k + o_kv, mask=m_n[:, None], other=0.0)
            b_v = tl.load(v + o_kv, mask=m_n[:, None], other=0.0)
            # addresses one block ahead: the pipeliner then only sees the loads of K and V
            b_row = list_rows(
                i_n + BN + o_n, end, num_condensed, first_page, p_pages, p_positions, p_slots, i_l, i_h, num_slots,
                H, COLUMNS, PS,
            )  # fmt: skip
            # shape [BM, D] @ [D, BN] -> [BM, BN]
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale_log2
            b_s = tl.where(m_n[None, :], b_s, EMPTY)
            b_new = tl.maximum(b_top, tl.max(b_s, 1))
            b_old = tl.exp2(b_top - b_new)
            b_p = tl.exp2(b_s - b_new[:, None])
            b_total = b_total * b_old + tl.sum(b_p, 1)
            # shape [BM, BN] @ [BN, D] -> [BM, D]
            b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_old[:, None], input_precision="ieee")
            b_top = b_new
        b_total = tl.where(end > start, b_total, 1.0)
        b_acc = b_acc / b_total[:, None]
        b_lse2 = b_top + tl.log2(b_total)
        num_splits = tl.load(p_item + 7)
        if num_splits == 1:
            store_state(b_acc, b_lse2, i_list, o, lse2, o_dense, lse2_dense, G, D, BM, HAS_DENSE)
        else:
            o_part = tl.cast(i_item, tl.int64) * G + o_m
            tl.store(partial_o + o_part[:, None] * D + o_d[None, :], b_acc, mask=m_m[:, None])
            tl.store(partial_lse2 + o_part, b_lse2, mask=m_m)
            # all threads' partial results must be out before this program counts as arrived
            tl.debug_barrier()
            arrived = tl.atomic_add(arrivals + i_list, 1, sem="acq_rel")
            if arrived == num_splits - 1:
                tl.store(arrivals + i_list, 0)
                b_o, b_lse2_list = reduce_splits(
                    partial_o, partial_lse2, tl.load(p_item + 6), num_splits, G, D, BG, BS
                )
                store_state(b_o, b_lse2_list, i_list, o, lse2, o_dense, lse2_dense, G, D, BG, HAS_DENSE)


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
            return cls(block_tokens=64, num_warps=4, num_stages=3, programs_per_multiprocessor=2)
        return cls(block_tokens=32, num_warps=4, num_stages=2, programs_per_multiprocessor=2)


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
    o: torch.Tensor,
    lse2: torch.Tensor,
    dense: tuple[torch.Tensor, torch.Tensor] | None = None,
    tuning: Tuning | None = None,
) -> None:
    """Attention of one query token per request over its condensed and sparse lists, into `o` and `lse2`.

    The rows of the batch are those of the last `plan_ragged_decode` on this workspace; later changes of the
    counts need a new plan.

    req_to_token: [R, T] integer slots; k_storage, v_storage: [L, S, H, D], the whole pool; q: [B, HQ, D], strided
    in B at most; o: [B, HQ, D] contiguous, any float dtype; lse2: [B, HQ] float32; dense: (o [B, HQ, D], lse2
    [B, HQ] float32), a state over other tokens to merge in, may alias (o, lse2).
    Guarantees: one launch, graph-safe, no allocation, no sync; deterministic; float32 accumulation. A list
    without tokens gives zeros and `EMPTY_LSE2`, or exactly the dense state.
    """
    B, HQ, D = q.shape
    H = layout.num_kv_heads
    assert k_storage.is_contiguous() and v_storage.is_contiguous(), "the pool must be contiguous"
    assert q.stride(2) == 1 and q.stride(1) == D and D in (64, 128, 256), (
        "q must be [B, HQ, D], D 64, 128 or 256"
    )
    assert q.dtype == k_storage.dtype == v_storage.dtype, "q and the pool must have one dtype"
    assert o.is_contiguous() and lse2.is_contiguous() and lse2.dtype == torch.float32, "o, lse2: contiguous"
    assert tables.condensed_pages.is_contiguous() and tables.sparse_positions.is_contiguous(), (
        "tables: contiguous"
    )
    assert req_to_token.stride(1) == 1 and B * H <= workspace.arrivals.numel(), "batch exceeds the workspace"
    o_dense, lse2_dense = (o, lse2) if dense is None else dense
    assert o_dense.is_contiguous() and lse2_dense.is_contiguous(), "the dense state must be contiguous"
    G = HQ // H
    tuning = tuning or Tuning.default(D, q.element_size())
    programs = workspace.num_multiprocessors * tuning.programs_per_multiprocessor
    ragged_decode_kernel[(min(programs, B * H * workspace.max_splits),)](
        q,
        k_storage,
        v_storage,
        o,
        lse2,
        o_dense,
        lse2_dense,
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
        G=G,
        H=H,
        D=D,
        COLUMNS=layout.columns,
        PS=layout.page_size,
        BM=max(16, triton.next_power_of_2(G)),
        BN=tuning.block_tokens,
        BG=triton.next_power_of_2(G),
        BS=8,
        HAS_DENSE=dense is not None,
        num_warps=tuning.num_warps,
        num_stages=tuning.num_stages,
    )
