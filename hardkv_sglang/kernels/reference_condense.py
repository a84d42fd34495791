"""Torch specification of a condense event; also what runs where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from hardkv_sglang.kernels.packed_rows import prepare_keys
from hardkv_sglang.kernels.reference_packed import move, take_statistics
from hardkv_sglang.memory_pool.layout import PoolLayout, head_pages_needed
from hardkv_sglang.memory_pool.tables import DeviceTables

Plan = tuple[torch.Tensor, torch.Tensor]
"""New counts [L, H] and exclusive prefix sum of their head pages [L, H], both int64."""

Where = TypeVar("Where")
"""Storage rows, or places of packed tokens."""


def plan_condense(layout: PoolLayout, tables: DeviceTables, row: int) -> Plan:
    """Counts and first head pages that the lists of `row` will have after a condense event."""
    capacity = tables.condensed_keep.shape[-1]
    num_condensed = tables.num_condensed[:, row].long()
    index = torch.arange(capacity, device=num_condensed.device)
    kept = (tables.condensed_keep[:, row] & (index < num_condensed[..., None])).sum(-1)
    counts = kept + tables.num_sparse[:, row].long()
    pages = head_pages_needed(counts, layout.head_page_tokens).flatten()
    return counts, (pages.cumsum(0) - pages).view_as(counts)


def condense(
    k_storage: torch.Tensor,
    v_storage: torch.Tensor,
    layout: PoolLayout,
    tables: DeviceTables,
    req_to_token: torch.Tensor,
    row: int,
    new_pages: torch.Tensor,
    is_first: bool = False,
) -> None:
    """Move the survivors of `row` (every layer and head) to `new_pages` and publish their lists, in place.

    Survivors of a list: its condensed tokens whose `condensed_keep` is set, then all its sparse tokens, so
    positions keep ascending. Afterwards the row has no sparse tokens, and every condensed token counts as kept
    until the next select event.

    k_storage, v_storage: [L, S, H, D] contiguous, the whole pool; req_to_token: [R, T] integer slots, read only;
    new_pages: [P] integer token pages, disjoint from every page in use. Entries of `condensed_pages` past P
    become 0. Sources are not written. Where survivors are packed, sparse tokens are quantised and the bytes of
    condensed ones stay as they are; is_first: no token of the request was condensed before, so its lists take their
    offsets and scales now.
    Raises `ValueError` when the survivors need more pages than given; nothing is written then.
    """
    counts, first = plan_condense(layout, tables, row)
    needed = int(first[-1, -1]) + int(head_pages_needed(counts[-1, -1], layout.head_page_tokens))
    if needed > new_pages.numel() * layout.columns:
        raise ValueError(f"row {row}: {needed} head pages do not fit in {new_pages.numel()} token pages")
    if layout.survivors.is_packed:
        if is_first:
            take_statistics(k_storage, tables, req_to_token, row)
        _move_packed(k_storage, v_storage, layout, tables, req_to_token, row, new_pages, (counts, first))
    else:
        source = torch.cat((_condensed_source(layout, tables, row), sparse_source(layout, tables, req_to_token, row)))
        target = torch.cat(_targets(layout.condensed_rows, tables, row, new_pages, (counts, first)))
        for storage in (k_storage, v_storage):
            rows = storage.view(-1, layout.head_dim)
            rows.index_copy_(0, target, rows.index_select(0, source))
    if tables.condensed_energy.shape[-1]:
        tables.condensed_energy[:, row] = _moved_energy(tables, row, counts)
    tables.num_condensed[:, row] = counts.to(torch.int32)
    tables.first_page[:, row] = first.to(torch.int32)
    tables.num_sparse[:, row] = 0
    tables.condensed_keep[:, row] = True
    tables.condensed_pages[row] = 0
    tables.condensed_pages[row, : new_pages.numel()] = new_pages.to(torch.int32)


def _survivors(tables: DeviceTables, row: int) -> torch.Tensor:
    """[L, H, C] bool, condensed tokens that survive."""
    keep = tables.condensed_keep[:, row]
    index = torch.arange(keep.shape[-1], device=keep.device)
    return keep & (index < tables.num_condensed[:, row, :, None])


def _sparse_mask(tables: DeviceTables, row: int) -> torch.Tensor:
    """[L, H, S] bool, valid entries of the sparse lists."""
    index = torch.arange(tables.sparse_positions.shape[-1], device=tables.num_sparse.device)
    return index < tables.num_sparse[:, row, :, None]


def _condensed_source(layout: PoolLayout, tables: DeviceTables, row: int) -> torch.Tensor:
    layer, head, index = _survivors(tables, row).nonzero(as_tuple=True)
    return layout.condensed_rows(tables.condensed_pages[row], tables.first_page[:, row][layer, head], index)


def sparse_source(layout: PoolLayout, tables: DeviceTables, req_to_token: torch.Tensor, row: int) -> torch.Tensor:
    """Storage rows of the row's sparse tokens, [N] int64, list after list."""
    layer, head, index = _sparse_mask(tables, row).nonzero(as_tuple=True)
    slots = req_to_token[row][tables.sparse_positions[:, row][layer, head, index].long()].long()
    return (layer * layout.num_slots + slots) * layout.num_kv_heads + head


def _move_packed(
    k_storage: torch.Tensor,
    v_storage: torch.Tensor,
    layout: PoolLayout,
    tables: DeviceTables,
    req_to_token: torch.Tensor,
    row: int,
    new_pages: torch.Tensor,
    plan: Plan,
) -> None:
    layer, head, index = _survivors(tables, row).nonzero(as_tuple=True)
    source = layout.packed_rows(tables.condensed_pages[row], tables.first_page[:, row][layer, head], index)
    condensed, sparse = _targets(layout.packed_rows, tables, row, new_pages, plan)
    target = torch.cat((condensed[0], sparse[0])), torch.cat((condensed[1], sparse[1]))
    layer, head, _ = _sparse_mask(tables, row).nonzero(as_tuple=True)
    rows = sparse_source(layout, tables, req_to_token, row)
    keys, values = (storage.view(-1, layout.head_dim).index_select(0, rows) for storage in (k_storage, v_storage))
    offset, scale = (x[layer, row, head] for x in (tables.key_offset, tables.key_scale))
    move(k_storage, layout, source, prepare_keys(keys, offset, scale), target)
    move(v_storage, layout, source, values, target)


def _moved_energy(tables: DeviceTables, row: int, counts: torch.Tensor) -> torch.Tensor:
    """`condensed_energy` of the row after the event, [L, H, C]; 0 behind the lists."""
    old, dense = tables.condensed_energy[:, row], tables.dense_energy[:, row]
    moved = torch.zeros_like(old)
    survivors = _survivors(tables, row)
    layer, head, index = survivors.nonzero(as_tuple=True)
    moved[layer, head, survivors.cumsum(-1)[layer, head, index] - 1] = old[layer, head, index]
    layer, head, index = _sparse_mask(tables, row).nonzero(as_tuple=True)
    positions = tables.sparse_positions[:, row][layer, head, index].long()
    rank = (counts - tables.num_sparse[:, row])[layer, head] + index
    moved[layer, head, rank] = dense[layer, head, positions % dense.shape[-1]]
    return moved


def _targets(
    place: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Where],
    tables: DeviceTables,
    row: int,
    new_pages: torch.Tensor,
    plan: Plan,
) -> tuple[Where, Where]:
    """Where the survivors go, condensed then sparse, in the order of the sources; place: of the layout."""
    counts, first = plan
    survivors = _survivors(tables, row)
    layer, head, index = survivors.nonzero(as_tuple=True)
    rank = survivors.cumsum(-1)[layer, head, index] - 1
    condensed = place(new_pages, first[layer, head], rank)
    layer, head, index = _sparse_mask(tables, row).nonzero(as_tuple=True)
    rank = (counts - tables.num_sparse[:, row])[layer, head] + index
    return condensed, place(new_pages, first[layer, head], rank)
