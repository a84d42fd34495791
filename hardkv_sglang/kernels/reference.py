"""Torch specification of decode attention over the tiers.

Computes in the dtype of its inputs, float32 at least: pass float64 tensors for an oracle.
"""

from __future__ import annotations

import math

import torch

from hardkv_sglang.kernels import EMPTY_LSE2
from hardkv_sglang.kernels.reference_packed import read_lists
from hardkv_sglang.memory_pool.layout import PoolLayout
from hardkv_sglang.memory_pool.tables import DeviceTables

State = tuple[torch.Tensor, torch.Tensor]
"""Attention output `[..., HQ, D]` (normalised) and its `lse2` `[..., HQ]`."""


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, counts: torch.Tensor, scale: float) -> State:
    """Attention of one query token over one ragged list per KV head.

    q: [HQ, D]; k, v: [H, N, D], list h in its first `counts[h]` entries; counts: [H]. Returns o [HQ, D] and
    lse2 [HQ] in float32 (float64 for float64 inputs); an empty list gives zeros and `EMPTY_LSE2`.
    """
    H, N, D = k.shape
    kind = torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(kind).view(H, -1, D)
    if N == 0:
        return torch.zeros_like(grouped).view(-1, D), grouped.new_full((q.shape[0],), EMPTY_LSE2)
    logits2 = grouped @ k.to(kind).transpose(1, 2) * (scale * math.log2(math.e))  # [H, G, N]
    outside = torch.arange(N, device=q.device)[None, :] >= counts[:, None]  # [H, N]
    logits2.masked_fill_(outside[:, None, :], -math.inf)
    top = logits2.amax(-1, keepdim=True).clamp(min=EMPTY_LSE2)
    weights = torch.exp2(logits2 - top)
    total = weights.sum(-1, keepdim=True)
    o = weights @ v.to(kind) / total.clamp(min=torch.finfo(kind).tiny)
    lse2 = torch.where(counts[:, None] > 0, (top + torch.log2(total)).squeeze(-1), EMPTY_LSE2)
    return o.view(-1, D), lse2.reshape(-1)


def merge_states(a: State, b: State) -> State:
    """Join two attention states over disjoint token sets by sum of exponentials.

    a, b: (o [..., HQ, D], lse2 [..., HQ]). Exact up to rounding; an empty state changes nothing; two empty
    states give zeros.
    """
    (o_a, lse2_a), (o_b, lse2_b) = a, b
    top = torch.maximum(lse2_a, lse2_b)
    w_a, w_b = torch.exp2(lse2_a - top), torch.exp2(lse2_b - top)
    total = w_a + w_b
    o = (o_a * w_a[..., None] + o_b * w_b[..., None]) / total[..., None]
    return o, top + torch.log2(total)


def dense_slots(
    req_to_token: torch.Tensor, tables: DeviceTables, row: int, seq_len: int, shared_len: int = 0
) -> torch.Tensor:
    """Slots of a row's dense tier, `[shared_len, prefix_end)` then `[recent_start, seq_len)`; [N], dtype of the row."""
    slots = req_to_token[row, :seq_len]
    recent_start = int(tables.recent_start[row])
    if recent_start == 0:
        return slots[shared_len:]
    return torch.cat((slots[shared_len : int(tables.prefix_end[row])], slots[recent_start:]))


def dense_decode(
    q: torch.Tensor,
    k_buffer: torch.Tensor,
    v_buffer: torch.Tensor,
    slots: torch.Tensor,
    scale: float,
) -> State:
    """Attention of one query token over its dense tier.

    q: [HQ, D]; k_buffer, v_buffer: [S, H, D], one layer of the pool; slots: [N].
    """
    counts = torch.full((k_buffer.shape[1],), slots.numel(), device=q.device)
    k, v = (buffer.index_select(0, slots).transpose(0, 1) for buffer in (k_buffer, v_buffer))
    return attend(q, k, v, counts, scale)


def ragged_rows(
    layout: PoolLayout, tables: DeviceTables, req_to_token: torch.Tensor, layer: int, row: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Storage rows of the condensed and sparse tokens of one (layer, row), head by head; packed tokens have none.

    Returns rows [H, N] int64 (list h in its first `counts[h]` entries, condensed before sparse, ascending
    positions; the rest is row 0 of the storage) and counts [H] int64.
    """
    rows, counts = ragged_rows_of_layers(layout, tables, req_to_token, slice(layer, layer + 1), row)
    return rows[0], counts[0]


def ragged_rows_of_layers(
    layout: PoolLayout, tables: DeviceTables, req_to_token: torch.Tensor, layers: slice, row: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [l, H, N] and counts [l, H] of some layers, N being the longest list."""
    num_condensed = tables.num_condensed[layers, row].long()[..., None]  # [l, H, 1]
    if layout.survivors.is_packed:
        num_condensed = torch.zeros_like(num_condensed)
    counts = num_condensed + tables.num_sparse[layers, row].long()[..., None]
    index = torch.arange(int(counts.max()), device=counts.device).expand(*counts.shape[:2], -1)
    condensed = layout.condensed_rows(
        tables.condensed_pages[row], tables.first_page[layers, row][..., None].expand_as(index), index
    )
    span = tables.sparse_positions.shape[-1]
    sparse_index = (index - num_condensed).clamp(0, span - 1)
    positions = tables.sparse_positions[layers, row].long().gather(2, sparse_index)
    heads = torch.arange(layout.num_kv_heads, device=counts.device)[:, None]
    layer_ids = torch.arange(layout.num_layers, device=counts.device)[layers, None, None]
    slots = req_to_token[row].long()[positions]
    sparse = (layer_ids * layout.num_slots + slots) * layout.num_kv_heads + heads
    rows = torch.where(index < num_condensed, condensed, sparse)
    return torch.where(index < counts, rows, 0), counts[..., 0]


def ragged_decode(
    q: torch.Tensor,
    k_storage: torch.Tensor,
    v_storage: torch.Tensor,
    layout: PoolLayout,
    tables: DeviceTables,
    req_to_token: torch.Tensor,
    layer: int,
    row: int,
    scale: float,
) -> State:
    """Attention of one query token over the condensed and sparse tiers of its request.

    q: [HQ, D]; k_storage, v_storage: [L, S, H, D], the whole pool, of its own type where survivors are packed.
    """
    rows, counts = ragged_rows(layout, tables, req_to_token, layer, row)
    k, v = (s.view(-1, q.shape[-1])[rows] for s in (k_storage, v_storage))
    state = attend(q, k, v, counts, scale)
    if not layout.survivors.is_packed:
        return state
    counts = tables.num_condensed[layer, row]
    index = torch.arange(int(counts.max()), device=q.device).expand(1, counts.numel(), -1)
    kind = torch.promote_types(q.dtype, torch.float32)
    k, v = read_lists(k_storage, v_storage, layout, tables, slice(layer, layer + 1), row, index, kind)
    return merge_states(attend(q, k[0], v[0], counts, scale), state)
