"""Slot list of a batch's dense tiers, for FlashInfer's page table: prefix, then recent window."""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl

from hardkv_sglang.memory_pool.tables import DeviceTables


@triton.jit
def dense_slots_kernel(
    req_to_token,
    rows,
    indptr,
    prefix_end,
    recent_start,
    slots,
    stride_req,
    BN: tl.constexpr,
):
    i_b, i_block = tl.program_id(0), tl.program_id(1)
    row = tl.load(rows + i_b).to(tl.int64)
    begin, end = tl.load(indptr + i_b), tl.load(indptr + i_b + 1)
    prefix, recent = tl.load(prefix_end + row), tl.load(recent_start + row)
    for i_n in range(i_block * BN, end - begin, tl.num_programs(1) * BN):
        o_n = i_n + tl.arange(0, BN)
        m_n = o_n < end - begin
        # positions between prefix and window are not live: the window starts right behind the prefix
        b_position = tl.where(o_n < prefix, o_n, o_n - prefix + recent)
        b_slot = tl.load(req_to_token + row * stride_req + b_position, mask=m_n, other=0)
        tl.store(slots + begin + o_n, b_slot, mask=m_n)


def dense_lens(tables: DeviceTables, rows: torch.Tensor, seq_lens: torch.Tensor) -> torch.Tensor:
    """Tokens in the dense tier of each request: [B] int32; no sync."""
    hidden = tables.recent_start[rows] - tables.prefix_end[rows]
    return seq_lens.to(torch.int32) - hidden


def write_dense_slots(
    req_to_token: torch.Tensor,
    tables: DeviceTables,
    rows: torch.Tensor,
    indptr: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """Write the slots of each request's dense tier, `[0, prefix_end)` then `[recent_start, seq_len)`.

    req_to_token: [R, T] int32; rows: [B] integer; indptr: [B + 1] int32, prefix sum of `dense_lens`;
    slots: [at least indptr[B]] int32, written. One launch, no sync, graph-safe.
    """
    assert req_to_token.stride(1) == 1, "rows of req_to_token must be contiguous"
    dense_slots_kernel[(rows.numel(), 4)](
        req_to_token,
        rows,
        indptr,
        tables.prefix_end,
        tables.recent_start,
        slots,
        stride_req=req_to_token.stride(0),
        BN=1024,
    )
