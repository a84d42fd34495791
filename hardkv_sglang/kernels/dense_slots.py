"""Slot list of a batch's dense tiers, for FlashInfer's page table: own prefix, then recent window."""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl

from hardkv_sglang.memory_pool.tables import DeviceTables


@triton.jit
def load_lens(rows, seq_lens, shared_len, prefix_end, recent_start, o_b, m_b):
    """Tokens in the dense tier of batch entries `o_b`, without those that a group attends; 0 where masked."""
    b_row = tl.load(rows + o_b, mask=m_b, other=0).to(tl.int64)
    b_hidden = tl.load(recent_start + b_row, mask=m_b, other=0) - tl.load(prefix_end + b_row, mask=m_b, other=0)
    b_hidden += tl.load(shared_len + o_b, mask=m_b, other=0)
    return tl.load(seq_lens + o_b, mask=m_b, other=0).to(tl.int32) - b_hidden


@triton.jit
def dense_slots_kernel(
    req_to_token,
    rows,
    seq_lens,
    shared_len,
    prefix_end,
    recent_start,
    indptr,
    slots,
    stride_req,
    BB: tl.constexpr,
    BN: tl.constexpr,
):
    i_b, i_block = tl.program_id(0), tl.program_id(1)
    # every program counts the entries before its own: cheaper than a launch that sums them
    b_before = tl.zeros([BB], tl.int32)
    for i_first in range(0, i_b, BB):
        o_b = i_first + tl.arange(0, BB)
        b_before += load_lens(rows, seq_lens, shared_len, prefix_end, recent_start, o_b, o_b < i_b)
    begin = tl.sum(b_before, 0)
    length = load_lens(rows, seq_lens, shared_len, prefix_end, recent_start, i_b, True)
    if i_block == 0:
        tl.store(indptr + i_b, begin)
        tl.store(indptr + i_b + 1, begin + length)
    row = tl.load(rows + i_b).to(tl.int64)
    shared = tl.load(shared_len + i_b)
    prefix, recent = tl.load(prefix_end + row), tl.load(recent_start + row)
    for i_n in range(i_block * BN, length, tl.num_programs(1) * BN):
        o_n = i_n + tl.arange(0, BN)
        m_n = o_n < length
        b_position = shared + o_n
        # positions between prefix and window are not live: the window starts right behind the prefix
        b_position = tl.where(b_position < prefix, b_position, b_position - prefix + recent)
        b_slot = tl.load(req_to_token + row * stride_req + b_position, mask=m_n, other=0)
        tl.store(slots + begin + o_n, b_slot, mask=m_n)


def plan_dense_slots(
    req_to_token: torch.Tensor,
    tables: DeviceTables,
    rows: torch.Tensor,
    seq_lens: torch.Tensor,
    shared_len: torch.Tensor,
    indptr: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """Write the slots of each request's dense tier, `[shared_len, prefix_end)` then `[recent_start, seq_len)`.

    req_to_token: [R, T] int32; rows: [B] integer; seq_lens: [B] integer, at least 1; shared_len: int32, at least B,
    leading tokens that are attended elsewhere; indptr: [B + 1] int32, written; slots: int32, written up to indptr[B].
    One launch, no allocation, no sync, graph-safe.
    """
    assert req_to_token.stride(1) == 1, "rows of req_to_token must be contiguous"
    dense_slots_kernel[(rows.numel(), 4)](
        req_to_token,
        rows,
        seq_lens,
        shared_len,
        tables.prefix_end,
        tables.recent_start,
        indptr,
        slots,
        stride_req=req_to_token.stride(0),
        BB=512,
        BN=1024,
    )
