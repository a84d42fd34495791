"""Decode attention over all tiers of a request by PyTorch's own CPU kernel.

`reference.py` attends tier by tier and merges, which is the definition. Here one call per layer attends the rows of all
tiers: on a CPU the number of operations is most of the time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from hardkv_sglang.kernels import reference
from hardkv_sglang.memory_pool.layout import PoolLayout
from hardkv_sglang.memory_pool.tables import DeviceTables

LOG2_E = math.log2(math.e)
SPARE_TOKENS = 512
"""Decode tokens for which a request's rows have room before they are found anew."""


@dataclass(frozen=True)
class LayerRows:
    """Rows of one layer that a request attends, the same number for every KV head."""

    rows: torch.Tensor  # [N, H] int64, rows of the storage: those of a token are adjacent in memory
    mask: torch.Tensor  # [H, N], 0 or, for padding, minus infinity, in the type of the attention


@dataclass
class RequestRows:
    """Rows that a request attends in all layers: lists, which stay as they are until its next event, then the dense
    tier, which grows by a token a step."""

    rows: torch.Tensor  # [L, C, H] int64; lists end at `dense_start`, padded in front to the longest
    mask: torch.Tensor  # [L, H, C], in the type of the attention
    longest: list[int]  # longest list of each layer
    dense_start: int
    end: int  # of the dense tier, at most C
    seq_len: int  # tokens of the request, the last of them at `end - 1`

    @classmethod
    def find(
        cls,
        layout: PoolLayout,
        tables: DeviceTables,
        req_to_token: torch.Tensor,
        row: int,
        seq_len: int,
        dtype: torch.dtype,
    ) -> RequestRows:
        """Rows of a request with `seq_len` tokens, at least one of them dense.

        dtype: of the attention, float32 or float64. CPU tensors.
        """
        lists, counts = reference.ragged_rows_of_layers(layout, tables, req_to_token, slice(None), row)
        dense = _dense_rows(layout, reference.dense_slots(req_to_token, tables, row, seq_len))
        start, longest = lists.shape[2], counts.amax(1)
        # every layer's lists end where the dense tier starts
        index = torch.arange(start) - (start - longest)[:, None, None]  # [L, 1, start]
        is_padding = (index < 0) | (index >= counts[..., None])
        # unused memory may hold NaN: padding reads a live token
        lists = lists.gather(2, index.clamp(min=0).expand_as(is_padding)).transpose(1, 2)
        lists = torch.where(is_padding.transpose(1, 2), dense[:, :1], lists)
        rows = pad(torch.cat((lists, dense), 1), (0, 0, 0, SPARE_TOKENS))
        mask = torch.zeros(rows.transpose(1, 2).shape, dtype=dtype)
        mask[..., :start].masked_fill_(is_padding, -math.inf)
        return cls(rows, mask, longest.tolist(), start, start + dense.shape[1], seq_len)

    def grow(self, layout: PoolLayout, slots: torch.Tensor) -> bool:
        """Append new tokens of the dense tier, slots [N]; False, and nothing done, if there is no room."""
        end = self.end + slots.numel()
        if end > self.rows.shape[1]:
            return False
        self.rows[:, self.end : end] = _dense_rows(layout, slots)
        self.end, self.seq_len = end, self.seq_len + slots.numel()
        return True

    def layers(self) -> list[LayerRows]:
        """What each layer attends now: views."""
        starts = [self.dense_start - size for size in self.longest]
        return [
            LayerRows(rows[start : self.end], mask[:, start : self.end])
            for rows, mask, start in zip(self.rows, self.mask, starts, strict=True)
        ]


class GatherBuffer:
    """Memory into which the rows that a request attends are copied; it grows, and keeps its size."""

    def __init__(self, storage: torch.Tensor) -> None:
        self._rows = storage.new_empty(2, 0, storage.shape[-1])

    def gather(self, k_storage: torch.Tensor, v_storage: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """K and V of storage rows [N], as [2, N, D]; valid until the next call."""
        if self._rows.shape[1] < rows.numel():
            self._rows = self._rows.new_empty(2, 2 * rows.numel(), self._rows.shape[-1])
        out = self._rows[:, : rows.numel()]
        # copies whole rows: several times faster on a CPU than indexing with a tensor
        torch.index_select(k_storage.view(-1, out.shape[-1]), 0, rows, out=out[0])
        torch.index_select(v_storage.view(-1, out.shape[-1]), 0, rows, out=out[1])
        return out


def _dense_rows(layout: PoolLayout, slots: torch.Tensor) -> torch.Tensor:
    """Storage rows of dense slots [N] in every layer and head, [L, N, H]."""
    layers, heads = torch.arange(layout.num_layers)[:, None, None], torch.arange(layout.num_kv_heads)
    return (layers * layout.num_slots + slots.long()[:, None]) * layout.num_kv_heads + heads


def attend(
    q: torch.Tensor,
    k_storage: torch.Tensor,
    v_storage: torch.Tensor,
    live: LayerRows,
    scale: float,
    buffer: GatherBuffer,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one query token over the live tokens of a request, of which there is one at least.

    q: [HQ, D]; k_storage, v_storage: [L, S, H, D], the whole pool. Returns o [H, HQ / H, D] and the natural-log LSE
    [H, HQ / H], in the type of the mask. CPU tensors.
    """
    (H, N), kind, (HQ, D) = live.mask.shape, live.mask.dtype, q.shape
    k, v = buffer.gather(k_storage, v_storage, live.rows.view(-1)).view(2, 1, N, H, D).transpose(2, 3).to(kind)
    # called below `scaled_dot_product_attention`, which does not return the LSE
    o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q.to(kind).view(1, H, HQ // H, D),
        k,
        v,
        attn_mask=live.mask[None, :, None, :].expand(1, H, HQ // H, N),
        scale=scale,
    )
    return o[0], lse[0].to(kind)
