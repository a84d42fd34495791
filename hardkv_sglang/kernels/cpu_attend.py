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
class LiveRows:
    """Live tokens of one request in one layer: the dense tier, then each head's list, padded to the longest."""

    rows: torch.Tensor  # [H * N] int64, rows of the storage
    mask: torch.Tensor  # [H, N], 0 or minus infinity, in the type of the attention


def find_live_rows(
    layout: PoolLayout, tables: DeviceTables, req_to_token: torch.Tensor, row: int, seq_len: int, dtype: torch.dtype
) -> list[LiveRows]:
    """Live rows of every layer, once per step. seq_len: tokens with KV; dtype: float32 or float64. CPU tensors."""
    lists, counts = reference.ragged_rows_of_layers(layout, tables, req_to_token, slice(None), row)
    slots = reference.dense_slots(req_to_token, tables, row, seq_len).long()
    layers, heads = torch.arange(layout.num_layers)[:, None, None], torch.arange(layout.num_kv_heads)[:, None]
    dense = (layers * layout.num_slots + slots) * layout.num_kv_heads + heads
    rows, counts = torch.cat((dense, lists), -1), counts + slots.numel()
    outside = torch.arange(rows.shape[-1]) >= counts[..., None]
    # unused memory may hold NaN: padding reads a live row
    rows = torch.where(outside, dense[..., :1], rows)
    mask = torch.zeros(rows.shape, dtype=dtype).masked_fill_(outside, -math.inf)
    longest = counts.amax(1).tolist()
    return [LiveRows(rows[i, :, :size].flatten(), mask[i, :, :size]) for i, size in enumerate(longest)]


def attend(q: torch.Tensor, k_storage: torch.Tensor, v_storage: torch.Tensor, live: LiveRows, scale: float) -> State:
    """Attention of one query token over the live tokens of a request, of which there is one at least.

    q: [HQ, D]; k_storage, v_storage: [L, S, H, D], the whole pool. Returns the state of `merge.State`, without batch
    dimension and in the type of the mask. CPU tensors.
    """
    (H, N), (HQ, D), kind = live.mask.shape, q.shape, live.mask.dtype
    # index_select copies whole rows: several times faster on a CPU than indexing with a tensor
    k, v = (s.view(-1, D).index_select(0, live.rows).view(1, H, N, D).to(kind) for s in (k_storage, v_storage))
    # called below `scaled_dot_product_attention`, which does not return the LSE
    o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q.to(kind).view(1, H, HQ // H, D),
        k,
        v,
        attn_mask=live.mask[None, :, None, :].expand(1, H, HQ // H, N),
        scale=scale,
    )
    return o.reshape(HQ, D), lse.reshape(HQ).to(kind) * LOG2_E
