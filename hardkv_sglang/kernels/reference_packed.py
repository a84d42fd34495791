"""Packed survivors in the pool: reading, writing and moving them, in torch. The definition."""

from __future__ import annotations

import torch

from hardkv_sglang.kernels.packed_rows import PackedRows, key_statistics, restore_keys
from hardkv_sglang.memory_pool.layout import PoolLayout
from hardkv_sglang.memory_pool.tables import DeviceTables

Places = tuple[torch.Tensor, torch.Tensor]
"""Where packed tokens are: places of codes and of scales, see `PoolLayout.packed_rows`."""


def load(storage: torch.Tensor, layout: PoolLayout, places: Places) -> PackedRows:
    """Bytes of the tokens at `places` ([N] each)."""
    codes, scales = _views(storage, layout)
    return PackedRows(codes.index_select(0, places[0]), scales.index_select(0, places[1]))


def store(storage: torch.Tensor, layout: PoolLayout, places: Places, rows: PackedRows) -> None:
    """Write them, in place."""
    codes, scales = _views(storage, layout)
    codes.index_copy_(0, places[0], rows.codes)
    scales.index_copy_(0, places[1], rows.scales)


def _views(storage: torch.Tensor, layout: PoolLayout) -> tuple[torch.Tensor, torch.Tensor]:
    assert storage.element_size() == layout.element_bytes, "the layout is of a pool of another type"
    codes = storage.view(torch.uint8).view(-1, layout.survivors.row_bytes)
    return codes, storage.view(torch.float16).view(-1, 2)


def read_lists(
    k_storage: torch.Tensor,
    v_storage: torch.Tensor,
    layout: PoolLayout,
    tables: DeviceTables,
    layers: slice,
    row: int,
    index: torch.Tensor,
    kind: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of packed tokens, [l, H, N, D] each, as they were but for rounding.

    index: [l, H, N], tokens of each list; 0 is read past a list's end. Returns type `kind`.
    """
    bits, shape = layout.survivor_bits, (*index.shape, layout.head_dim)
    first_page = tables.first_page[layers, row][..., None].expand_as(index)
    is_live = (index < tables.num_condensed[layers, row][..., None])[..., None]
    codes, scales = layout.packed_rows(tables.condensed_pages[row], first_page, index)
    flat = codes.flatten(), scales.flatten()
    k, v = (load(x, layout, flat).dequantise(bits, kind).view(shape) for x in (k_storage, v_storage))
    offset, scale = (x[layers, row][:, :, None] for x in (tables.key_offset, tables.key_scale))
    return torch.where(is_live, restore_keys(k, offset, scale), 0.0), torch.where(is_live, v, 0.0)


def take_statistics(k_storage: torch.Tensor, tables: DeviceTables, req_to_token: torch.Tensor, row: int) -> None:
    """Offset and scale of the row's lists, from the keys of all its tokens up to the recent window, in place.

    Before its first condense event, when all of them are there; from then on the lists keep them.
    """
    slots = req_to_token[row, : int(tables.recent_start[row])].long()
    for layer, keys in enumerate(k_storage):
        offset, scale = key_statistics(keys[slots].transpose(0, 1))
        tables.key_offset[layer, row], tables.key_scale[layer, row] = offset, scale


def move(storage: torch.Tensor, layout: PoolLayout, source: Places, rows: torch.Tensor, target: Places) -> None:
    """Copy the packed tokens at `source`, and quantise `rows` ([N, D], prepared) behind them, to `target`, in place.

    Bytes of packed tokens stay as they are. Sources are not written.
    """
    old, new = load(storage, layout, source), PackedRows.quantise(rows, layout.survivor_bits)
    both = PackedRows(torch.cat((old.codes, new.codes)), torch.cat((old.scales, new.scales)))
    store(storage, layout, target, both)
