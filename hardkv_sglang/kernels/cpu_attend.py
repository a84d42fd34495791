"""Decode attention over all tiers of a request by PyTorch's own CPU kernel.

`reference.py` attends tier by tier and merges, which is the definition. Here one call per layer attends the rows of all
tiers: on a CPU the number of operations is most of the time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from hardkv_sglang.kernels import reference
from hardkv_sglang.kernels.reference import State
from hardkv_sglang.memory_pool.layout import PoolLayout
from hardkv_sglang.memory_pool.tables import DeviceTables

LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class LayerRows:
    """Rows of one layer that a request attends, the same number for every KV head."""

    rows: torch.Tensor  # [H, N] int64, rows of the storage
    mask: torch.Tensor  # [H, N], 0 or, for padding, minus infinity, in the type of the attention


def find_lists(
    layout: PoolLayout, tables: DeviceTables, req_to_token: torch.Tensor, row: int, dtype: torch.dtype
) -> list[LayerRows]:
    """Condensed and sparse lists of every layer, padded to the longest; they stay as they are until the next event.

    dtype: float32 or float64. CPU tensors.
    """
    rows, counts = reference.ragged_rows_of_layers(layout, tables, req_to_token, slice(None), row)
    outside = torch.arange(rows.shape[-1]) >= counts[..., None]
    # unused memory may hold NaN: padding reads the first live token
    first = reference.dense_slots(req_to_token, tables, row, int(tables.recent_start[row]) + 1)[:1].long()
    rows = torch.where(outside, _dense_rows(layout, first), rows)
    mask = torch.zeros(rows.shape, dtype=dtype).masked_fill_(outside, -math.inf)
    longest = counts.amax(1).tolist()
    return [LayerRows(rows[i, :, :size].contiguous(), mask[i, :, :size].contiguous()) for i, size in enumerate(longest)]


def no_lists(layout: PoolLayout, dtype: torch.dtype) -> list[LayerRows]:
    """Lists of a request without an event."""
    shape = (layout.num_kv_heads, 0)
    empty = LayerRows(torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=dtype))
    return [empty] * layout.num_layers


def add_dense(lists: list[LayerRows], layout: PoolLayout, slots: torch.Tensor) -> list[LayerRows]:
    """Lists and the dense tier (`reference.dense_slots`) of every layer, once per step."""
    dense, mask = _dense_rows(layout, slots.long()), lists[0].mask.new_zeros(layout.num_kv_heads, slots.numel())
    return [
        LayerRows(torch.cat((layer.rows, dense[i]), 1), torch.cat((layer.mask, mask), 1))
        for i, layer in enumerate(lists)
    ]


def _dense_rows(layout: PoolLayout, slots: torch.Tensor) -> torch.Tensor:
    """Storage rows of dense slots [N] in every layer and head, [L, H, N]."""
    layers, heads = torch.arange(layout.num_layers)[:, None, None], torch.arange(layout.num_kv_heads)[:, None]
    return (layers * layout.num_slots + slots) * layout.num_kv_heads + heads


def attend(q: torch.Tensor, k_storage: torch.Tensor, v_storage: torch.Tensor, live: LayerRows, scale: float) -> State:
    """Attention of one query token over the live tokens of a request, of which there is one at least.

    q: [HQ, D]; k_storage, v_storage: [L, S, H, D], the whole pool. Returns the state of `merge.State`, without batch
    dimension and in the type of the mask. CPU tensors.
    """
    (H, N), (HQ, D), kind, rows = live.mask.shape, q.shape, live.mask.dtype, live.rows.flatten()
    # index_select copies whole rows: several times faster on a CPU than indexing with a tensor
    k, v = (s.view(-1, D).index_select(0, rows).view(1, H, N, D).to(kind) for s in (k_storage, v_storage))
    # called below `scaled_dot_product_attention`, which does not return the LSE
    o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q.to(kind).view(1, H, HQ // H, D),
        k,
        v,
        attn_mask=live.mask[None, :, None, :].expand(1, H, HQ // H, N),
        scale=scale,
    )
    return o.reshape(HQ, D), lse.reshape(HQ).to(kind) * LOG2_E
