"""Condense events: survivors of every layer and head of all due requests move to their new head pages.

Three launches on one stream: count the survivors, copy them, publish the lists; one more in between where tokens
remember their energy. The copy reads the tables that the publication then overwrites, so the order matters;
`reference_condense.py` is the specification.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl

from hardkv_sglang.kernels.condense_lists import count_kernel, new_first_page, publish_kernel, remember_kernel
from hardkv_sglang.kernels.packed_condense import PackedCopy
from hardkv_sglang.memory_pool.layout import PoolLayout
from hardkv_sglang.memory_pool.tables import DeviceTables


@triton.jit
def list_rows(
    b_index,
    end,
    num_condensed,
    first_page,
    p_pages,
    p_positions,
    p_slots,
    i_l,
    i_h,
    num_slots,
    H: tl.constexpr,
    COLUMNS: tl.constexpr,
    PS: tl.constexpr,
):
    """Storage rows (int64) of the tokens `b_index` of list (i_l, i_h): condensed tokens first, then sparse.

    Rows of tokens at or past `end` are arbitrary.
    """
    m_condensed = b_index < num_condensed
    b_seq = first_page + b_index // PS
    b_column = b_seq % COLUMNS
    b_page = tl.load(p_pages + b_seq // COLUMNS, mask=m_condensed & (b_index < end), other=0)
    m_sparse = (b_index >= num_condensed) & (b_index < end)
    b_position = tl.load(p_positions + (b_index - num_condensed), mask=m_sparse, other=0)
    b_dense_slot = tl.load(p_slots + b_position, mask=m_sparse, other=0)
    b_slot = tl.where(m_condensed, b_page * PS + b_index % PS, b_dense_slot.to(tl.int32))
    b_layer = tl.where(m_condensed, b_column // H, i_l)
    b_head = tl.where(m_condensed, b_column % H, i_h)
    return (b_layer.to(tl.int64) * num_slots + b_slot) * H + b_head


# pages differ from event to event: specialising on them would compile in the middle of serving
@triton.jit(do_not_specialize=["num_new_pages"])
def copy_kernel(
    rows,
    new_pages,
    counts,
    k,
    v,
    num_condensed,
    first_page,
    num_sparse,
    condensed_keep,
    condensed_pages,
    sparse_positions,
    req_to_token,
    num_rows,
    num_slots,
    capacity,
    num_new_pages,
    max_pages,
    max_span,
    stride_req,
    H: tl.constexpr,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    PS: tl.constexpr,
    SEGMENT: tl.constexpr,
    BN: tl.constexpr,
    BCOL: tl.constexpr,
):
    i_j, i_c, i_segment = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    row = tl.load(rows + i_j).to(tl.int64)
    i_l, i_h = i_c // H, i_c % H
    o_table = (i_l * num_rows + row) * H + i_h
    old_len = tl.load(num_condensed + o_table)
    old_first_page = tl.load(first_page + o_table)
    start = i_segment * SEGMENT
    end = tl.minimum(start + SEGMENT, old_len + tl.load(num_sparse + o_table))
    if start < end:
        i_first = new_first_page(counts, i_j, i_c, COLUMNS, PS, BCOL)
        p_keep = condensed_keep + o_table * capacity
        o_n = tl.arange(0, BN)
        # survivors before this segment
        b_before = tl.zeros([BN], tl.int32)
        for i_n in range(0, tl.minimum(start, old_len), BN):
            m_before = i_n + o_n < tl.minimum(start, old_len)
            b_before += tl.load(p_keep + i_n + o_n, mask=m_before, other=0).to(tl.int32)
        num_copied = tl.sum(b_before, 0) + tl.maximum(start - old_len, 0)
        for i_n in range(start, end, BN):
            b_index = i_n + o_n
            b_keep = tl.load(p_keep + b_index, mask=b_index < tl.minimum(end, old_len), other=1)
            m_n = (b_index < end) & (b_keep != 0)
            b_source = list_rows(
                b_index, end, old_len, old_first_page, condensed_pages + row * max_pages,
                sparse_positions + o_table * max_span, req_to_token + row * stride_req, i_l, i_h, num_slots,
                H, COLUMNS, PS,
            )  # fmt: skip
            b_rank = num_copied + tl.cumsum(m_n.to(tl.int32), 0) - 1
            b_seq = i_first + b_rank // PS
            # a row too many must never land in somebody else's page
            m_n = m_n & (b_seq // COLUMNS < num_new_pages)
            b_page = tl.load(new_pages + i_j * num_new_pages + b_seq // COLUMNS, mask=m_n, other=0)
            b_slot = b_page.to(tl.int64) * PS + b_rank % PS
            b_column = b_seq % COLUMNS
            b_target = ((b_column // H).to(tl.int64) * num_slots + b_slot) * H + b_column % H
            # [BN, D] offsets
            o_source = b_source[:, None] * D + tl.arange(0, D)[None, :]
            o_target = b_target[:, None] * D + tl.arange(0, D)[None, :]
            b_k = tl.load(k + o_source, mask=m_n[:, None])
            b_v = tl.load(v + o_source, mask=m_n[:, None])
            tl.store(k + o_target, b_k, mask=m_n[:, None])
            tl.store(v + o_target, b_v, mask=m_n[:, None])
            num_copied += tl.sum(m_n.to(tl.int32), 0)


def condense(
    k_storage: torch.Tensor,
    v_storage: torch.Tensor,
    layout: PoolLayout,
    tables: DeviceTables,
    req_to_token: torch.Tensor,
    rows: torch.Tensor,
    new_pages: torch.Tensor,
) -> None:
    """Move the survivors of every list of `rows` to `new_pages` and publish the new lists, in place.

    A list's survivors: its condensed tokens with `condensed_keep` set, then all its sparse tokens. Afterwards
    `num_sparse` is 0, every condensed token counts as kept, and `condensed_pages` is the given pages, then 0.

    k_storage, v_storage: [L, S, H, D] contiguous, the whole pool; req_to_token: [R, T] integer slots, read only;
    rows: [J] integer, distinct request rows; new_pages: [J, P] integer token pages, each row enough for its
    survivors, disjoint from every page in use; entries past a row's need are published but not used.
    Guarantees: three to five launches on the current stream, no sync; sources are not written; bit-exact copies, but
    for what packed head pages quantise by the offsets and scales of the tables. Tokens that do not fit the given pages
    are dropped from the copy rather than written elsewhere.
    """
    J, P = new_pages.shape
    columns, capacity = layout.columns, tables.condensed_keep.shape[-1]
    max_pages, max_span = tables.condensed_pages.shape[1], tables.sparse_positions.shape[-1]
    assert k_storage.is_contiguous() and v_storage.is_contiguous(), "the pool must be contiguous"
    assert rows.is_contiguous() and new_pages.is_contiguous() and rows.numel() == J, "rows [J], new_pages [J, P]"
    assert max_pages >= P and req_to_token.stride(1) == 1, "more pages than the table holds"
    counts = torch.empty(J, columns, dtype=torch.int32, device=rows.device)
    keep = tables.condensed_keep.view(torch.uint8)
    num_rows, H = tables.num_condensed.shape[1], layout.num_kv_heads
    block_columns, segment = triton.next_power_of_2(columns), 512
    lists = (tables.num_condensed, tables.first_page, tables.num_sparse)
    count_kernel[(J, columns)](
        rows, lists[0], lists[2], keep, counts, num_rows, capacity, H=H, COLUMNS=columns, BC=1024, num_warps=4
    )
    if layout.survivors.is_packed:
        PackedCopy(layout, tables, req_to_token, rows, new_pages, counts).run(k_storage, v_storage)
    else:
        copy_kernel[(J, columns, triton.cdiv(capacity + max_span, segment))](
            rows, new_pages, counts, k_storage, v_storage, *lists, keep, tables.condensed_pages,
            tables.sparse_positions, req_to_token, num_rows, layout.num_slots, capacity, P, max_pages, max_span,
            req_to_token.stride(0), H=H, D=layout.head_dim, COLUMNS=columns, PS=layout.page_size, SEGMENT=segment,
            BN=64, BCOL=block_columns, num_warps=4,
        )  # fmt: skip
    if tables.condensed_energy.shape[-1]:
        remember_kernel[(J, columns)](
            rows, lists[0], lists[2], keep, tables.sparse_positions, tables.condensed_energy, tables.dense_energy,
            num_rows, capacity, max_span, tables.dense_energy.shape[-1], H=H, BN=1024, num_warps=4,
        )  # fmt: skip
    publish_kernel[(J, columns)](
        rows, new_pages, counts, *lists, keep, tables.condensed_pages, num_rows, capacity, P, max_pages, H=H,
        COLUMNS=columns, PAGE_TOKENS=layout.head_page_tokens, BN=1024, BCOL=block_columns, num_warps=4,
    )  # fmt: skip
