"""Decode attention over packed survivors by PyTorch's own CPU operators, for a batch at once.

Keys stay prepared: the query is prepared instead, once, and what is the same for all keys of a list goes into its LSE.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hardkv_sglang.kernels.cpu_attend import RaggedRows, attend
from hardkv_sglang.kernels.packed_rows import prepare_queries
from hardkv_sglang.kernels.reference import State
from hardkv_sglang.kernels.reference_packed import load
from hardkv_sglang.memory_pool.layout import PoolLayout
from hardkv_sglang.memory_pool.tables import DeviceTables


@dataclass(frozen=True)
class PackedLists:
    """Condensed tokens of a request in all layers, which stay as they are until its next event."""

    codes: list[torch.Tensor]  # [N] by layer, head after head, see `PoolLayout.packed_rows`
    scales: list[torch.Tensor]  # [N] by layer
    counts: torch.Tensor  # [L, H]

    @classmethod
    def read(cls, layout: PoolLayout, tables: DeviceTables, row: int) -> PackedLists:
        """Lists of a request row."""
        counts = tables.num_condensed[:, row].long()
        index = torch.arange(int(counts.max())).expand(*counts.shape, -1)
        first_page = tables.first_page[:, row][..., None].expand_as(index)
        is_live = index < counts[..., None]
        places = layout.packed_rows(tables.condensed_pages[row], first_page, index)
        codes, scales = (x[is_live].split(counts.sum(1).tolist()) for x in places)
        return cls(list(codes), list(scales), counts)


@dataclass(frozen=True)
class PackedBatch:
    """Condensed tokens of a batch in one layer: each is unpacked once, for all query heads of its list."""

    codes: torch.Tensor  # [N]
    scales: torch.Tensor  # [N]
    lists: RaggedRows  # of the batch's queries, over these N


def join_packed(lists: Sequence[PackedLists], group: int, dtype: torch.dtype) -> list[PackedBatch]:
    """Condensed tiers of a batch, by layer. group: query heads per KV head; dtype: of the attention."""
    batches = []
    for layer in range(len(lists[0].counts)):
        counts = torch.cat([request.counts[layer] for request in lists])  # [B * H]
        codes, scales = (
            torch.cat([getattr(request, name)[layer] for request in lists]) for name in ("codes", "scales")
        )
        rows = torch.cat([of_list.repeat(group) for of_list in torch.arange(len(codes)).split(counts.tolist())])
        ragged = RaggedRows.of(counts.repeat_interleave(group), rows, len(codes), dtype)
        batches.append(PackedBatch(codes, scales, ragged))
    return batches


def attend_packed(
    q: torch.Tensor,
    k_storage: torch.Tensor,
    v_storage: torch.Tensor,
    layout: PoolLayout,
    tables: DeviceTables,
    layer: int,
    rows: torch.Tensor,
    batch: PackedBatch,
    scale: float,
) -> State:
    """Attention of a batch's queries over its condensed tier.

    q: [B, HQ, D]; k_storage, v_storage: [L, S, H, D], the whole pool; rows: [B] request rows. Returns o [B * HQ, D]
    and lse2 [B * HQ] in the type of the attention; an empty list weighs nothing in a merge.
    """
    kind = batch.lists.logits2.dtype
    offset, key_scale = (x[layer, rows][:, :, None] for x in (tables.key_offset, tables.key_scale))  # [B, H, 1, D]
    grouped = q.to(kind).view(*offset.shape[:2], -1, q.shape[-1])
    prepared, constant = prepare_queries(grouped, offset, key_scale)
    k, v = (
        load(x, layout, (batch.codes, batch.scales)).dequantise(layout.survivor_bits, kind)
        for x in (k_storage, v_storage)
    )
    o, lse2 = attend(prepared.reshape(-1, q.shape[-1]), k, v, batch.lists, scale)
    return o, lse2 + constant.flatten() * (scale * math.log2(math.e))
