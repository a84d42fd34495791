"""Storage rows that the requests of a decode batch attend on a CPU, for `cpu_attend.py`.

Queries are numbered request by request, query head by query head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from hardkv_sglang.kernels import reference
from hardkv_sglang.kernels.cpu_attend import RaggedRows
from hardkv_sglang.memory_pool.layout import PoolLayout
from hardkv_sglang.memory_pool.tables import DeviceTables


@dataclass(frozen=True)
class RequestLists:
    """Condensed and sparse tokens of a request in all layers, which stay as they are until its next event."""

    rows: torch.Tensor  # [L, H, N], rows of the whole storage, list (l, h) in its first `counts[l, h]` entries
    counts: torch.Tensor  # [L, H]

    @classmethod
    def read(cls, layout: PoolLayout, tables: DeviceTables, req_to_token: torch.Tensor, row: int) -> RequestLists:
        """Lists of a request row."""
        return cls(*reference.ragged_rows_of_layers(layout, tables, req_to_token, slice(None), row))


def join_lists(lists: Sequence[RequestLists], layout: PoolLayout, group: int, dtype: torch.dtype) -> list[RaggedRows]:
    """Condensed and sparse tiers of a batch, by layer: rows of the whole storage.

    group: query heads per KV head; dtype: of the attention.
    """
    longest = max(request.rows.shape[2] for request in lists)
    rows = torch.stack([pad(r.rows, (0, longest - r.rows.shape[2])) for r in lists], 1)  # [L, B, H, N]
    counts = torch.stack([request.counts for request in lists], 1)  # [L, B, H]
    is_live = (torch.arange(longest) < counts[..., None])[..., None, :].expand(-1, -1, -1, group, -1)
    counts = counts.repeat_interleave(group, 2).flatten(1)  # [L, Q]
    live_rows = rows[..., None, :].expand(is_live.shape)[is_live].split(counts.sum(1).tolist())
    num_rows = layout.columns * layout.num_slots
    return [RaggedRows.of(c, r, num_rows, dtype) for c, r in zip(counts, live_rows, strict=True)]


def join_dense(slots: Sequence[torch.Tensor], layout: PoolLayout, group: int, dtype: torch.dtype) -> RaggedRows:
    """Dense tier of a batch, given the slots [N] of each request: rows of one layer's storage, the same in all.

    group: query heads per KV head; dtype: of the attention.
    """
    heads = torch.arange(layout.num_kv_heads).repeat_interleave(group)[:, None]  # [HQ, 1]
    rows = torch.cat([(s.long() * layout.num_kv_heads + heads).flatten() for s in slots])
    counts = torch.tensor([s.numel() for s in slots]).repeat_interleave(heads.numel())
    return RaggedRows.of(counts, rows, layout.num_slots * layout.num_kv_heads, dtype)
