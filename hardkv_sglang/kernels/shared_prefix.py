"""Decode attention over prefixes that requests of a batch share: each is read once for a tile of requests.

The second level of a cascade. FlashInfer's own fixes the number of groups, and with them the launch, when a graph is
captured; this one reads its work list from device memory. `finish_layer` joins the states of its splits.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from hardkv_sglang.kernels.dependent_launch import launch_options, wait_for_previous
from hardkv_sglang.kernels.merge import EMPTY
from hardkv_sglang.kernels.ragged_decode import attend_block
from hardkv_sglang.kernels.shared_plan import ITEM_FIELDS, SharedPrefixWorkspace
from hardkv_sglang.memory_pool.layout import PoolLayout


@triton.jit(do_not_specialize=["i_l"])
def shared_prefix_kernel(
    q,
    k,
    v,
    num_items,
    members,
    items,
    slots,
    partial_o,
    partial_lse2,
    scale_log2,
    i_l,
    max_items,
    num_slots,
    stride_q,
    G: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    FIELDS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        wait_for_previous()
    first_slot = tl.cast(i_l, tl.int64) * num_slots
    o_m = tl.arange(0, BM)
    o_n = tl.arange(0, BN)
    o_d = tl.arange(0, D)
    # heads of one split are neighbours: together they read whole slots
    for i_work in range(tl.program_id(0), tl.load(num_items) * H, tl.num_programs(0)):
        i_item, i_h = i_work // H, i_work % H
        p_item = items + i_item * FIELDS
        first_member, num_members = tl.load(p_item), tl.load(p_item + 1)
        start, end = tl.load(p_item + 2), tl.load(p_item + 3)
        m_m = o_m < num_members * G
        b_entry = tl.load(members + first_member + o_m // G, mask=m_m, other=0).to(tl.int64)
        # [BM, D], the query group of this KV head of every member
        o_q = b_entry * stride_q + (i_h * G + o_m % G) * D
        b_q = tl.load(q + o_q[:, None] + o_d[None, :], mask=m_m[:, None], other=0.0)
        p_slots = slots + tl.load(p_item + 4)
        b_top = tl.full([BM], EMPTY, tl.float32)
        b_total = tl.zeros([BM], tl.float32)
        b_acc = tl.zeros([BM, D], tl.float32)
        b_slot = tl.load(p_slots + start + o_n, mask=start + o_n < end, other=0)
        for i_n in range(start, end, BN):
            m_n = i_n + o_n < end
            o_kv = ((first_slot + b_slot) * H + i_h)[:, None] * D + o_d[None, :]
            b_k = tl.load(k + o_kv, mask=m_n[:, None], other=0.0)
            b_v = tl.load(v + o_kv, mask=m_n[:, None], other=0.0)
            # one block ahead, so that no block waits for its slots
            b_slot = tl.load(p_slots + i_n + BN + o_n, mask=i_n + BN + o_n < end, other=0)
            b_top, b_total, b_acc = attend_block(b_q, b_k, b_v, m_n, b_top, b_total, b_acc, scale_log2)
        # [H, N, BM]: splits of a tile lie next to each other
        o_part = (tl.cast(i_h, tl.int64) * max_items + i_item) * BM + o_m
        b_o = b_acc * (1.0 / b_total)[:, None]
        tl.store(partial_o + o_part[:, None] * D + o_d[None, :], b_o, mask=m_m[:, None])
        tl.store(partial_lse2 + o_part, b_top + tl.log2(b_total), mask=m_m)


def shared_prefix_decode(
    workspace: SharedPrefixWorkspace,
    layout: PoolLayout,
    k_storage: torch.Tensor,
    v_storage: torch.Tensor,
    layer: int,
    q: torch.Tensor,
    scale: float,
) -> None:
    """Attention of one query token per request over its shared prefix, into the workspace.

    The groups are those of the last `workspace.plan`, their slots those of the last `copy_shared_slots`.

    k_storage, v_storage: [L, S, H, D] contiguous, the whole pool; q: [B, HQ, D], D 64, 128 or 256, strided in B at
    most.
    Guarantees: one launch, graph-safe, no allocation, no sync; deterministic for the same groups; float32 accumulation.
    """
    HQ, D = q.shape[1:]
    H, tuning = layout.num_kv_heads, workspace.tuning
    assert q.stride(2) == 1 and q.stride(1) == D and D in (64, 128, 256), "q must be [B, HQ, D], D 64, 128 or 256"
    assert q.dtype == k_storage.dtype == v_storage.dtype, "q and the pool must have one dtype"
    assert k_storage.is_contiguous() and v_storage.is_contiguous(), "the pool must be contiguous"
    assert workspace.group_size == HQ // H, "the workspace is for other heads"
    shared_prefix_kernel[(workspace.num_multiprocessors * tuning.programs_per_multiprocessor,)](
        q,
        k_storage,
        v_storage,
        workspace.num_items,
        workspace.members,
        workspace.items,
        workspace.slots,
        workspace.partial_o,
        workspace.partial_lse2,
        scale_log2=scale * math.log2(math.e),
        i_l=layer,
        max_items=workspace.max_items,
        num_slots=layout.num_slots,
        stride_q=q.stride(0),
        G=HQ // H,
        H=H,
        D=D,
        FIELDS=ITEM_FIELDS,
        BM=tuning.tile_rows,
        BN=tuning.block_tokens,
        num_warps=tuning.num_warps,
        num_stages=tuning.num_stages,
        **launch_options(q.device),
    )
