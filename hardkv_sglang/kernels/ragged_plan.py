"""Work list of the ragged decode attention: every list of a batch cut into splits, on the device.

An even cut lays the lists of a layer end to end and gives every program the same number of pages. A fixed one cuts
every list at the same positions, whatever else is in the batch.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl

from hardkv_sglang.kernels.ragged_workspace import ITEM_FIELDS, RaggedWorkspace
from hardkv_sglang.memory_pool.layout import PoolLayout
from hardkv_sglang.memory_pool.tables import DeviceTables

FIELDS = tl.constexpr(ITEM_FIELDS)


@triton.jit
def load_lists(o_list, m_list, rows, num_condensed, num_sparse, i_l, num_rows, H: tl.constexpr):
    """Row, table offset, condensed tokens and length of lists `o_list` (batch-major) of layer `i_l`."""
    b_row = tl.load(rows + o_list // H, mask=m_list, other=0).to(tl.int64)
    o_table = (i_l * num_rows + b_row) * H + o_list % H
    b_condensed = tl.load(num_condensed + o_table, mask=m_list, other=0)
    b_sparse = tl.load(num_sparse + o_table, mask=m_list, other=0)
    return b_row, o_table, b_condensed, b_condensed + b_sparse


@triton.jit
def even_share(
    rows, num_condensed, num_sparse, i_l, num_lists, num_rows, num_programs,
    H: tl.constexpr, PS: tl.constexpr, TOKENS: tl.constexpr, SPLITS: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """Pages that each program of this layer gets, and all pages, a partial last page of a list counted whole."""
    b_total = tl.zeros([BB], tl.int32)
    b_longest = tl.zeros([BB], tl.int32)
    for i_list in range(0, num_lists, BB):
        o_list = i_list + tl.arange(0, BB)
        m_list = o_list < num_lists
        _, _, _, b_len = load_lists(o_list, m_list, rows, num_condensed, num_sparse, i_l, num_rows, H)
        b_pages = tl.cdiv(tl.where(m_list, b_len, 0), PS)
        b_total += b_pages
        b_longest = tl.maximum(b_longest, b_pages)
    total = tl.sum(b_total, 0)
    # a list begins inside of one share, so that it may touch one more than its length says
    share = tl.maximum(tl.cdiv(total, num_programs), tl.cdiv(tl.max(b_longest, 0), SPLITS - 1))
    return tl.maximum(share, TOKENS // PS), total


@triton.jit
def count_splits(b_first, b_pages, b_share):
    """Splits of lists of `b_pages` pages that begin at page `b_first`, cut at multiples of `b_share`."""
    return tl.where(b_pages > 0, (b_first + b_pages - 1) // b_share - b_first // b_share + 1, 0)


# the batch size of an eager step may be any: specialising on it would compile in the middle of serving
@triton.jit(do_not_specialize=["num_lists", "num_programs"])
def plan_kernel(
    rows,
    num_condensed,
    first_page,
    num_sparse,
    items,
    program_items,
    num_lists,
    num_rows,
    num_programs,
    max_items,
    max_programs,
    H: tl.constexpr,
    PS: tl.constexpr,
    EVEN: tl.constexpr,
    TOKENS: tl.constexpr,
    SPLITS: tl.constexpr,
    BL: tl.constexpr,
    BS: tl.constexpr,
    BB: tl.constexpr,
    BP: tl.constexpr,
):
    i_l = tl.program_id(0).to(tl.int64)
    first_list = tl.program_id(1) * BL
    # every program counts pages and splits again: cheaper than to wait for another program
    share, total = even_share(
        rows, num_condensed, num_sparse, i_l, num_lists, num_rows, num_programs, H, PS, TOKENS, SPLITS, BB
    )
    pages_before, items_before = 0, 0
    for i_list in range(0, first_list, BB):
        o_list = i_list + tl.arange(0, BB)
        m_list = o_list < first_list
        _, _, _, b_len = load_lists(o_list, m_list, rows, num_condensed, num_sparse, i_l, num_rows, H)
        b_pages = tl.cdiv(tl.where(m_list, b_len, 0), PS)
        if EVEN:
            b_first = pages_before + tl.cumsum(b_pages, 0) - b_pages
            items_before += tl.sum(count_splits(b_first, b_pages, share), 0)
            pages_before += tl.sum(b_pages, 0)
        else:
            b_share = tl.maximum(TOKENS // PS, tl.cdiv(b_pages, SPLITS))
            items_before += tl.sum(count_splits(b_pages * 0, b_pages, b_share), 0)
    o_list = first_list + tl.arange(0, BL)
    m_list = o_list < num_lists
    b_row, o_table, b_condensed, b_len = load_lists(o_list, m_list, rows, num_condensed, num_sparse, i_l, num_rows, H)
    b_first_page = tl.load(first_page + o_table, mask=m_list, other=0)
    b_pages = tl.cdiv(tl.where(m_list, b_len, 0), PS)
    if EVEN:
        b_first = pages_before + tl.cumsum(b_pages, 0) - b_pages
        b_share = b_pages * 0 + share
    else:
        b_first = b_pages * 0
        b_share = tl.maximum(TOKENS // PS, tl.cdiv(b_pages, SPLITS))
    b_splits = count_splits(b_first, b_pages, b_share)
    b_first_item = items_before + tl.cumsum(b_splits, 0) - b_splits
    # [BL, BS] items
    o_split = tl.arange(0, BS)[None, :]
    m_item = o_split < b_splits[:, None]
    b_item = b_first_item[:, None] + o_split
    # the share that a split lies in, and the pages of the list in front of it
    b_part = (b_first // b_share)[:, None] + o_split
    b_start = tl.maximum(b_part * b_share[:, None] - b_first[:, None], 0)
    b_end = (b_part + 1) * b_share[:, None] - b_first[:, None]
    p_item = items + (i_l * max_items + b_item) * FIELDS
    tl.store(p_item, o_list[:, None], mask=m_item)
    tl.store(p_item + 1, b_row.to(tl.int32)[:, None], mask=m_item)
    tl.store(p_item + 2, b_start * PS, mask=m_item)
    tl.store(p_item + 3, tl.minimum(b_end * PS, b_len[:, None]), mask=m_item)
    tl.store(p_item + 4, b_condensed[:, None], mask=m_item)
    tl.store(p_item + 5, b_first_page[:, None], mask=m_item)
    tl.store(p_item + 6, b_first_item[:, None], mask=m_item)
    tl.store(p_item + 7, b_splits[:, None], mask=m_item)
    p_programs = program_items + i_l * (max_programs + 1)
    if EVEN:
        is_first = (b_start + b_first[:, None]) % share == 0
        tl.store(p_programs + b_part, b_item, mask=m_item & is_first)
    if first_list + BL >= num_lists:
        num_items = tl.max(b_first_item + b_splits, 0)
        o_p = tl.arange(0, BP)
        if EVEN:
            tl.store(p_programs + o_p, num_items, mask=(o_p >= tl.cdiv(total, share)) & (o_p <= num_programs))
        else:
            tl.store(p_programs + o_p, o_p * num_items // num_programs, mask=o_p <= num_programs)


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
    sync. How a list is split depends on its length and, with the even rule, on the other lists of its layer.
    """
    num_lists = rows.numel() * layout.num_kv_heads
    assert rows.is_contiguous() and rows.dtype in (torch.int32, torch.int64), "rows must be contiguous integers"
    assert num_lists <= workspace.max_lists, "batch exceeds the workspace's max_batch"
    for table in (tables.num_condensed, tables.first_page, tables.num_sparse):
        assert table.is_contiguous() and table.dtype == torch.int32, "tables must be contiguous int32"
    lists_per_program, max_programs = 32, workspace.program_items.shape[1] - 1
    plan_kernel[(layout.num_layers, triton.cdiv(num_lists, lists_per_program))](
        rows,
        tables.num_condensed,
        tables.first_page,
        tables.num_sparse,
        workspace.items,
        workspace.program_items,
        num_lists=num_lists,
        num_rows=tables.num_condensed.shape[1],
        num_programs=workspace.num_programs(num_lists),
        max_items=workspace.items.shape[1],
        max_programs=max_programs,
        H=layout.num_kv_heads,
        PS=layout.page_size,
        EVEN=workspace.rule.is_even,
        TOKENS=workspace.rule.tokens,
        SPLITS=workspace.max_splits,
        BL=lists_per_program,
        BS=triton.next_power_of_2(workspace.max_splits),
        BB=1024,
        BP=triton.next_power_of_2(max_programs + 1),
        num_warps=4,
    )
