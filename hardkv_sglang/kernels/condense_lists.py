"""Lists around the copy of a condense event: how long they become, where they start, and their publication."""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def count_kernel(
    rows,
    num_condensed,
    num_sparse,
    condensed_keep,
    counts,
    num_rows,
    capacity,
    H: tl.constexpr,
    COLUMNS: tl.constexpr,
    BC: tl.constexpr,
):
    i_j, i_c = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_table = ((i_c // H) * num_rows + tl.load(rows + i_j).to(tl.int64)) * H + i_c % H
    old_len = tl.load(num_condensed + o_table)
    b_kept = tl.zeros([BC], tl.int32)
    for i_n in range(0, old_len, BC):
        o_n = i_n + tl.arange(0, BC)
        b_kept += tl.load(condensed_keep + o_table * capacity + o_n, mask=o_n < old_len, other=0).to(tl.int32)
    tl.store(counts + i_j * COLUMNS + i_c, tl.sum(b_kept, 0) + tl.load(num_sparse + o_table))


@triton.jit
def new_first_page(counts, i_j, i_c, COLUMNS: tl.constexpr, PAGE_TOKENS: tl.constexpr, BCOL: tl.constexpr):
    """First head page of list `i_c`: head pages of all lists before it, layer by layer."""
    o_c = tl.arange(0, BCOL)
    b_count = tl.load(counts + i_j * COLUMNS + o_c, mask=o_c < i_c, other=0)
    return tl.sum(tl.cdiv(b_count, PAGE_TOKENS), 0)


@triton.jit
def remember_kernel(
    rows,
    num_condensed,
    num_sparse,
    condensed_keep,
    sparse_positions,
    condensed_energy,
    dense_energy,
    num_rows,
    capacity,
    max_span,
    remembered_span,
    H: tl.constexpr,
    BN: tl.constexpr,
):
    """Energies move as the tokens do, inside the table: a survivor never moves to the right."""
    i_j, i_c = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_table = ((i_c // H) * num_rows + tl.load(rows + i_j).to(tl.int64)) * H + i_c % H
    p_energy = condensed_energy + o_table * capacity
    old_len, sparse_len = tl.load(num_condensed + o_table), tl.load(num_sparse + o_table)
    o_n = tl.arange(0, BN)
    moved = 0
    for i_n in range(0, old_len, BN):
        m_n = i_n + o_n < old_len
        b_keep = tl.load(condensed_keep + o_table * capacity + i_n + o_n, mask=m_n, other=0).to(tl.int32)
        b_energy = tl.load(p_energy + i_n + o_n, mask=m_n, other=0.0)
        # every thread has read the block before any of it is overwritten
        tl.debug_barrier()
        tl.store(p_energy + moved + tl.cumsum(b_keep, 0) - 1, b_energy, mask=b_keep != 0)
        moved += tl.sum(b_keep, 0)
        tl.debug_barrier()
    for i_n in range(0, sparse_len, BN):
        m_n = (i_n + o_n < sparse_len) & (moved + i_n + o_n < capacity)
        b_position = tl.load(sparse_positions + o_table * max_span + i_n + o_n, mask=m_n, other=0)
        b_energy = tl.load(dense_energy + o_table * remembered_span + b_position % remembered_span, mask=m_n, other=0.0)
        tl.store(p_energy + moved + i_n + o_n, b_energy, mask=m_n)


# pages differ from event to event: specialising on them would compile in the middle of serving
@triton.jit(do_not_specialize=["num_new_pages"])
def publish_kernel(
    rows,
    new_pages,
    counts,
    num_condensed,
    first_page,
    num_sparse,
    condensed_keep,
    condensed_pages,
    num_rows,
    capacity,
    num_new_pages,
    max_pages,
    H: tl.constexpr,
    COLUMNS: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BN: tl.constexpr,
    BCOL: tl.constexpr,
):
    i_j, i_c = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = tl.load(rows + i_j).to(tl.int64)
    o_table = ((i_c // H) * num_rows + row) * H + i_c % H
    count = tl.load(counts + i_j * COLUMNS + i_c)
    tl.store(num_condensed + o_table, count)
    tl.store(first_page + o_table, new_first_page(counts, i_j, i_c, COLUMNS, PAGE_TOKENS, BCOL))
    tl.store(num_sparse + o_table, 0)
    o_n = tl.arange(0, BN)
    for i_n in range(0, tl.minimum(count, capacity), BN):
        m_n = i_n + o_n < tl.minimum(count, capacity)
        tl.store(condensed_keep + o_table * capacity + i_n + o_n, 1, mask=m_n)
    if i_c == 0:
        for i_n in range(0, max_pages, BN):
            m_new = i_n + o_n < num_new_pages
            b_page = tl.load(new_pages + i_j * num_new_pages + i_n + o_n, mask=m_new, other=0)
            p_page = condensed_pages + row * max_pages + i_n + o_n
            tl.store(p_page, b_page.to(tl.int32), mask=i_n + o_n < max_pages)
