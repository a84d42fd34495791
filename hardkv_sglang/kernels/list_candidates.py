"""Candidates of a select event as storage rows, one program per list: `CandidateReader` is the specification."""

# mypy: allow-untyped-defs
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from hardkv_sglang.lifecycle.step_plan import SelectOp
from hardkv_sglang.memory_pool.rank_memory import RankMemory


@dataclass(frozen=True)
class CandidateRows:
    """Where the candidates of B lists are: condensed tokens, right-aligned, then the sparse span."""

    rows: torch.Tensor  # [B, N] int64, storage rows; arbitrary but valid where padded. Of a packed token: where it is
    padding: torch.Tensor  # [B] int32, entries before a list's first candidate
    valid: torch.Tensor  # [B, N] bool, candidates that exist
    attended: torch.Tensor  # [B, N] bool, candidates that the observed queries attended; padding counts as attended


# positions and bounds differ from event to event: specialising on them would compile in the middle of serving
@triton.jit(do_not_specialize=["row", "first_layer", "bound", "condensed_end", "old_recent_start", "N"])
def list_candidates_kernel(
    num_condensed,
    first_page,
    num_sparse,
    sparse_positions,
    condensed_pages,
    req_to_token,
    rows,
    padding,
    valid,
    attended,
    row,
    first_layer,
    bound,
    condensed_end,
    old_recent_start,
    N,
    num_rows,
    num_slots,
    max_pages,
    max_span,
    stride_req,
    H: tl.constexpr,
    COLUMNS: tl.constexpr,
    PS: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    CHUNK_ROWS: tl.constexpr,
    BN: tl.constexpr,
):
    i_b = tl.program_id(0)
    i_l, i_h = first_layer + i_b // H, i_b % H
    row_wide = tl.cast(row, tl.int64)
    o_table = (i_l.to(tl.int64) * num_rows + row) * H + i_h
    o_list = i_b.to(tl.int64) * N
    first = tl.load(first_page + o_table)
    num_padding = bound - tl.load(num_condensed + o_table)
    tl.store(padding + i_b, num_padding)
    o_block = tl.arange(0, BN)
    for i_n in range(0, N, BN):
        o_n = i_n + o_block
        m_n = o_n < N
        b_index = o_n - num_padding
        m_condensed = (b_index >= 0) & (o_n < bound)
        b_seq = first + tl.maximum(b_index, 0) // PAGE_TOKENS
        b_page = tl.load(condensed_pages + row_wide * max_pages + b_seq // COLUMNS, mask=m_condensed, other=0)
        b_position = condensed_end + o_n - bound
        b_dense = tl.load(req_to_token + row_wide * stride_req + b_position, mask=m_n & (o_n >= bound), other=0)
        b_column = b_seq % COLUMNS
        b_slot = tl.where(m_condensed, b_page * PS + b_index % PAGE_TOKENS // CHUNK_ROWS, b_dense.to(tl.int32))
        b_layer, b_head = tl.where(m_condensed, b_column // H, i_l), tl.where(m_condensed, b_column % H, i_h)
        tl.store(rows + o_list + o_n, (b_layer.to(tl.int64) * num_slots + b_slot) * H + b_head, mask=m_n)
        tl.store(valid + o_list + o_n, (b_index >= 0).to(tl.uint8), mask=m_n)
        m_attended = (o_n < bound) | (b_position >= old_recent_start)
        tl.store(attended + o_list + o_n, m_attended.to(tl.uint8), mask=m_n)
    # of the old sparse span only what was listed; other threads wrote its zeros
    tl.debug_barrier()
    for i_s in range(0, tl.load(num_sparse + o_table), BN):
        m_s = i_s + o_block < tl.load(num_sparse + o_table)
        b_position = tl.load(sparse_positions + o_table * max_span + i_s + o_block, mask=m_s, other=0)
        tl.store(attended + o_list + bound + b_position - condensed_end, 1, mask=m_s)


def list_candidates(memory: RankMemory, op: SelectOp, layers: slice) -> CandidateRows:
    """Candidates of the lists of these layers, in the order of the tables. One launch, no sync.

    layers: a slice with start and stop.
    """
    layout, tables, req_to_token = memory.layout, memory.tables, memory.req_to_token
    H = layout.num_kv_heads
    B, N = (layers.stop - layers.start) * H, op.condensed_list_bound + op.scanned_end - op.condensed_end
    device = req_to_token.device
    result = CandidateRows(
        rows=torch.empty(B, N, dtype=torch.int64, device=device),
        padding=torch.empty(B, dtype=torch.int32, device=device),
        valid=torch.empty(B, N, dtype=torch.bool, device=device),
        attended=torch.empty(B, N, dtype=torch.bool, device=device),
    )
    list_candidates_kernel[(B,)](
        tables.num_condensed, tables.first_page, tables.num_sparse, tables.sparse_positions, tables.condensed_pages,
        req_to_token, result.rows, result.padding, result.valid.view(torch.uint8), result.attended.view(torch.uint8),
        op.row, layers.start, op.condensed_list_bound, op.condensed_end, op.old_recent_start, N,
        tables.num_condensed.shape[1], layout.num_slots, tables.condensed_pages.shape[1],
        tables.sparse_positions.shape[-1], req_to_token.stride(0), H=H, COLUMNS=layout.columns, PS=layout.page_size,
        PAGE_TOKENS=layout.head_page_tokens, CHUNK_ROWS=layout.survivors.rows_per_chunk, BN=1024, num_warps=4,
    )  # fmt: skip
    return result
