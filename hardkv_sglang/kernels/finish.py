"""Last kernel of a layer's attention: joins what groups attended of a request's prefix, and records its query.

The observation ring holds queries and LSE, over all tokens, of the decode steps that the next select event will read.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl

from hardkv_sglang.kernels.dependent_launch import launch_options, wait_for_previous
from hardkv_sglang.kernels.merge import State, merge_into, reduce_splits
from hardkv_sglang.kernels.shared_plan import ENTRY_FIELDS, SharedPrefixWorkspace
from hardkv_sglang.memory_pool.tables import DeviceTables


@triton.jit(do_not_specialize=["i_l"])
def finish_kernel(
    q,
    o,
    lse2,
    rows,
    seq_lens,
    ring_slot,
    query_ring,
    lse2_ring,
    entries,
    partial_o,
    partial_lse2,
    i_l,
    num_slots,
    max_items,
    stride_q,
    G: tl.constexpr,
    HQ: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    BM: tl.constexpr,
    BH: tl.constexpr,
    SHARED: tl.constexpr,
    FIELDS: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        wait_for_previous()
    i_b, i_block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = tl.load(rows + i_b).to(tl.int64)
    i_slot = tl.load(ring_slot + row).to(tl.int64)
    # one block of query heads, BH rows of D
    o_h = i_block * BH + tl.arange(0, BH)
    m_h = o_h < HQ
    o_d = tl.arange(0, D)
    if SHARED:
        p_entry = entries + i_b * FIELDS
        num_splits = tl.load(p_entry + 1)
        if num_splits > 0:
            first_item, first_row = tl.load(p_entry), tl.load(p_entry + 2)
            # splits of one KV head lie BM rows apart
            o_part = ((o_h // G).to(tl.int64) * max_items + first_item) * BM + first_row + o_h % G
            b_o, b_lse2 = reduce_splits(partial_o, partial_lse2, o_part, m_h, BM, num_splits, D, BH, 4)
            merge_into(b_o, b_lse2, i_b * HQ + o_h, m_h, o, lse2, D)
            # the ring gets the merged LSE, which another thread may have written
            tl.debug_barrier()
    if i_slot >= 0:
        position = tl.load(seq_lens + i_b).to(tl.int64) - 1
        o_ring = ((tl.cast(i_l, tl.int64) * num_slots + i_slot) * W + position % W) * HQ + o_h
        b_q = tl.load(q + i_b * stride_q + o_h[:, None] * D + o_d[None, :], mask=m_h[:, None])
        tl.store(query_ring + o_ring[:, None] * D + o_d[None, :], b_q, mask=m_h[:, None])
        tl.store(lse2_ring + o_ring, tl.load(lse2 + i_b * HQ + o_h, mask=m_h), mask=m_h)


def finish_layer(
    tables: DeviceTables,
    shared: SharedPrefixWorkspace | None,
    layer: int,
    rows: torch.Tensor,
    seq_lens: torch.Tensor,
    q: torch.Tensor,
    state: State,
) -> None:
    """Join the states of shared prefixes into `state`, then record the queries of requests that have a ring slot.

    shared: what `shared_prefix_decode` just filled; None: no prefix is attended by a group. rows: [B] integer;
    seq_lens: [B] integer, the new token included; q: [B, HQ, D] after RoPE, contiguous in its last two axes;
    state: (o [B, HQ, D], any float dtype, lse2 [B, HQ] float32), contiguous, over all other tokens.
    Guarantees: one launch, in place, no allocation, no sync, graph-safe; deterministic for the same groups. Row 0 never
    has a ring slot.
    """
    B, HQ, D = q.shape
    assert q.stride(1) == D and q.stride(2) == 1, "q: [B, HQ, D]"
    assert state[0].is_contiguous() and state[1].is_contiguous(), "the state must be contiguous"
    block_heads = min(8, triton.next_power_of_2(HQ))
    # without groups these are never read
    entries, partial_o, partial_lse2 = (
        (shared.entries, shared.partial_o, shared.partial_lse2) if shared else (rows, state[0], state[1])
    )
    finish_kernel[(B, triton.cdiv(HQ, block_heads))](
        q,
        *state,
        rows,
        seq_lens,
        tables.ring_slot,
        tables.query_ring,
        tables.lse2_ring,
        entries,
        partial_o,
        partial_lse2,
        i_l=layer,
        num_slots=tables.query_ring.shape[1],
        max_items=shared.max_items if shared else 1,
        stride_q=q.stride(0),
        G=shared.group_size if shared else 1,
        HQ=HQ,
        D=D,
        W=tables.query_ring.shape[2],
        BM=shared.tuning.tile_rows if shared else 1,
        BH=block_heads,
        SHARED=shared is not None,
        FIELDS=ENTRY_FIELDS,
        **launch_options(q.device),
    )
