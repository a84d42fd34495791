"""Observation ring: queries and merged LSE of the decode steps that the next select event will read."""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl

from hardkv_sglang.kernels.dependent_launch import launch_options, wait_for_previous
from hardkv_sglang.memory_pool.tables import DeviceTables


@triton.jit(do_not_specialize=["i_l"])
def observe_kernel(
    q,
    lse2,
    rows,
    seq_lens,
    ring_slot,
    query_ring,
    lse2_ring,
    i_l,
    num_slots,
    stride_q,
    HQ: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    BH: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        wait_for_previous()
    i_b, i_block = tl.program_id(0), tl.program_id(1)
    row = tl.load(rows + i_b).to(tl.int64)
    i_slot = tl.load(ring_slot + row).to(tl.int64)
    if i_slot >= 0:
        position = tl.load(seq_lens + i_b).to(tl.int64) - 1
        o_h = i_block * BH + tl.arange(0, BH)
        m_h = o_h < HQ
        o_d = tl.arange(0, D)
        o_ring = ((tl.cast(i_l, tl.int64) * num_slots + i_slot) * W + position % W) * HQ + o_h
        # one block of query heads, BH rows of D
        b_q = tl.load(q + i_b.to(tl.int64) * stride_q + o_h[:, None] * D + o_d[None, :], mask=m_h[:, None])
        tl.store(query_ring + o_ring[:, None] * D + o_d[None, :], b_q, mask=m_h[:, None])
        b_lse2 = tl.load(lse2 + i_b * HQ + o_h, mask=m_h)
        tl.store(lse2_ring + o_ring, b_lse2, mask=m_h)


def observe(
    tables: DeviceTables,
    layer: int,
    rows: torch.Tensor,
    seq_lens: torch.Tensor,
    q: torch.Tensor,
    lse2: torch.Tensor,
) -> None:
    """Record the step's queries of requests that have a ring slot, in place in the ring.

    rows: [B] integer; seq_lens: [B] integer, the new token included; q: [B, HQ, D] after RoPE, contiguous in its
    last two axes; lse2: [B, HQ] float32 contiguous. One launch, no sync, graph-safe. Row 0 never has a slot.
    """
    B, HQ, D = q.shape
    assert q.stride(1) == D and q.stride(2) == 1 and lse2.is_contiguous(), "q [B, HQ, D], lse2 [B, HQ]"
    block_heads = min(8, triton.next_power_of_2(HQ))
    observe_kernel[(B, triton.cdiv(HQ, block_heads))](
        q,
        lse2,
        rows,
        seq_lens,
        tables.ring_slot,
        tables.query_ring,
        tables.lse2_ring,
        i_l=layer,
        num_slots=tables.query_ring.shape[1],
        stride_q=q.stride(0),
        HQ=HQ,
        D=D,
        W=tables.query_ring.shape[2],
        BH=block_heads,
        **launch_options(q.device),
    )
