"""Work list of the ragged decode attention: every list of a batch cut into splits, on the device."""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl

from hardkv_sglang.kernels.ragged_workspace import ITEM_FIELDS, RaggedWorkspace
from hardkv_sglang.memory_pool.layout import PoolLayout
from hardkv_sglang.memory_pool.tables import DeviceTables

MIDDLE_FROM, LARGE_FROM = tl.constexpr(1024), tl.constexpr(3072)
"""Listed tokens per multiprocessor and layer from which splits are middle-sized and large (measured on an H200)."""

SPLIT_ALIGN = 64  # at least the page size, so that a split starts at a page
FIELDS = tl.constexpr(ITEM_FIELDS)


@triton.jit
def load_lists(o_list, m_list, rows, num_condensed, num_sparse, i_l, num_rows, H: tl.constexpr):
    """Row, table offset, condensed tokens and length of lists `o_list` (batch-major) of layer `i_l`."""
    b_row = tl.load(rows + o_list // H, mask=m_list, other=0).to(tl.int64)
    o_table = (i_l * num_rows + b_row) * H + o_list % H
    b_condensed = tl.load(num_condensed + o_table, mask=m_list, other=0)
    return b_row, o_table, b_condensed, b_condensed + tl.load(num_sparse + o_table, mask=m_list, other=0)


@triton.jit
def split_geometry(b_len, split, SPLITS: tl.constexpr, ALIGN: tl.constexpr):
    """Number of splits and tokens per split of lists of that length; an empty list has none."""
    b_splits = tl.minimum(tl.maximum(tl.cdiv(b_len, split), 1), SPLITS)
    b_size = tl.maximum(tl.cdiv(tl.cdiv(b_len, b_splits), ALIGN), 1) * ALIGN
    return tl.cdiv(b_len, b_size), b_size


@triton.jit
def split_tokens(
    rows,
    num_condensed,
    num_sparse,
    i_l,
    num_lists,
    num_rows,
    H: tl.constexpr,
    SMS: tl.constexpr,
    SMALL: tl.constexpr,
    MIDDLE: tl.constexpr,
    LARGE: tl.constexpr,
    BB: tl.constexpr,
):
    """Tokens per split of this layer, from all that its lists hold."""
    b_total = tl.zeros([BB], tl.int32)
    for i_list in range(0, num_lists, BB):
        o_list = i_list + tl.arange(0, BB)
        m_list = o_list < num_lists
        _, _, _, b_len = load_lists(o_list, m_list, rows, num_condensed, num_sparse, i_l, num_rows, H)
        b_total += tl.where(m_list, b_len, 0)
    load = tl.sum(b_total, 0) // SMS
    return tl.where(load >= LARGE_FROM, LARGE, tl.where(load >= MIDDLE_FROM, MIDDLE, SMALL))


# the batch size of an eager step may be any: specialising on it would compile in the middle of serving
@triton.jit(do_not_specialize=["num_lists"])
def plan_kernel(
    rows,
    num_condensed,
    first_page,
    num_sparse,
    items,
    num_items,
    num_lists,
    num_rows,
    max_items,
    H: tl.constexpr,
    SMS: tl.constexpr,
    SMALL: tl.constexpr,
    MIDDLE: tl.constexpr,
    LARGE: tl.constexpr,
    SPLITS: tl.constexpr,
    ALIGN: tl.constexpr,
    BL: tl.constexpr,
    BS: tl.constexpr,
    BB: tl.constexpr,
):
    i_l = tl.program_id(0).to(tl.int64)
    first_list = tl.program_id(1) * BL
    # every program counts tokens and splits again: cheaper than to wait for another program
    split = split_tokens(rows, num_condensed, num_sparse, i_l, num_lists, num_rows, H, SMS, SMALL, MIDDLE, LARGE, BB)
    b_before = tl.zeros([BB], tl.int32)
    for i_list in range(0, first_list, BB):
        o_list = i_list + tl.arange(0, BB)
        m_list = o_list < first_list
        _, _, _, b_len = load_lists(o_list, m_list, rows, num_condensed, num_sparse, i_l, num_rows, H)
        b_before += tl.where(m_list, split_geometry(b_len, split, SPLITS, ALIGN)[0], 0)
    o_list = first_list + tl.arange(0, BL)
    m_list = o_list < num_lists
    b_row, o_table, b_condensed, b_len = load_lists(o_list, m_list, rows, num_condensed, num_sparse, i_l, num_rows, H)
    b_first_page = tl.load(first_page + o_table, mask=m_list, other=0)
    b_splits, b_size = split_geometry(b_len, split, SPLITS, ALIGN)
    b_splits = tl.where(m_list, b_splits, 0)
    b_first_item = tl.sum(b_before, 0) + tl.cumsum(b_splits, 0) - b_splits
    if first_list + BL >= num_lists:
        tl.store(num_items + i_l, tl.max(b_first_item + b_splits, 0))
    # [BL, BS] items
    o_split = tl.arange(0, BS)[None, :]
    m_item = o_split < b_splits[:, None]
    b_item = b_first_item.to(tl.int64)[:, None] + o_split
    p_item = items + (i_l * max_items + b_item) * FIELDS
    b_start = o_split * b_size[:, None]
    tl.store(p_item, o_list[:, None], mask=m_item)
    tl.store(p_item + 1, b_row.to(tl.int32)[:, None], mask=m_item)
    tl.store(p_item + 2, b_start, mask=m_item)
    tl.store(p_item + 3, tl.minimum(b_start + b_size[:, None], b_len[:, None]), mask=m_item)
    tl.store(p_item + 4, b_condensed[:, None], mask=m_item)
    tl.store(p_item + 5, b_first_page[:, None], mask=m_item)
    tl.store(p_item + 6, b_first_item[:, None], mask=m_item)
    tl.store(p_item + 7, b_splits[:, None], mask=m_item)


@triton.jit
def load_item(items, i_item):
    """Fields of one work item: list, row, start, end, condensed tokens, first head page, first item, splits."""
    p_item = items + i_item * FIELDS
    i_list, row, start = tl.load(p_item), tl.load(p_item + 1).to(tl.int64), tl.load(p_item + 2)
    end, num_condensed, first_page = tl.load(p_item + 3), tl.load(p_item + 4), tl.load(p_item + 5)
    return i_list, row, start, end, num_condensed, first_page, tl.load(p_item + 6), tl.load(p_item + 7)


def plan_ragged_decode(
    workspace: RaggedWorkspace, layout: PoolLayout, tables: DeviceTables, rows: torch.Tensor
) -> None:
    """Write the work lists of all layers for one decode step; first node of a captured step.

    rows: [B] int32 or int64 contiguous, request row of each batch entry; row 0 pads and has empty lists.
    Guarantees: one launch; reads the tables when it runs, so a captured graph follows them; no allocation, no
    sync. How a list is split depends on its length and, unless splits are `fixed`, on the load of its layer.
    """
    num_lists = rows.numel() * layout.num_kv_heads
    assert rows.is_contiguous() and rows.dtype in (torch.int32, torch.int64), "rows must be contiguous integers"
    assert num_lists <= workspace.max_lists, "batch exceeds the workspace's max_batch"
    for table in (tables.num_condensed, tables.first_page, tables.num_sparse):
        assert table.is_contiguous() and table.dtype == torch.int32, "tables must be contiguous int32"
    lists_per_program = 32
    plan_kernel[(layout.num_layers, triton.cdiv(num_lists, lists_per_program))](
        rows,
        tables.num_condensed,
        tables.first_page,
        tables.num_sparse,
        workspace.items,
        workspace.num_items,
        num_lists=num_lists,
        num_rows=tables.num_condensed.shape[1],
        max_items=workspace.items.shape[1],
        H=layout.num_kv_heads,
        SMS=workspace.num_multiprocessors,
        SMALL=workspace.split.small,
        MIDDLE=workspace.split.middle,
        LARGE=workspace.split.large,
        SPLITS=workspace.max_splits,
        ALIGN=layout.head_page_tokens if layout.survivors.is_packed else SPLIT_ALIGN,
        BL=lists_per_program,
        BS=triton.next_power_of_2(workspace.max_splits),
        BB=1024,
        num_warps=4,
    )
