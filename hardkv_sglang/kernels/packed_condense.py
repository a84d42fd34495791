"""The copy of a condense event into packed head pages: bytes of condensed survivors move, sparse tokens are quantised.

Two launches between those of `condense` that count and publish. `reference_condense.py` and `packed_rows.py` are the
specification.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from hardkv_sglang.kernels.condense_lists import new_first_page
from hardkv_sglang.kernels.packed_decode import rotate, split_halves
from hardkv_sglang.kernels.packed_rows import LARGEST
from hardkv_sglang.memory_pool.layout import PoolLayout
from hardkv_sglang.memory_pool.tables import DeviceTables

MOST = tl.constexpr(LARGEST)


@triton.jit
def packed_places(
    b_index,
    first_page,
    p_pages,
    m_n,
    num_slots,
    H: tl.constexpr,
    COLUMNS: tl.constexpr,
    PS: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    CHUNK_ROWS: tl.constexpr,
    CHUNK_SCALES: tl.constexpr,
    FIRST_SCALE: tl.constexpr,
):
    """Where tokens `b_index` of a list are, in rows of codes and in scales (int64): `PoolLayout.packed_rows`."""
    b_sequence = first_page + b_index // PAGE_TOKENS
    b_within = b_index % PAGE_TOKENS
    b_page = tl.load(p_pages + b_sequence // COLUMNS, mask=m_n, other=0).to(tl.int64)
    b_column = b_sequence % COLUMNS
    b_first = ((b_column // H).to(tl.int64) * num_slots + b_page * PS) * H + b_column % H
    b_code = (b_first + b_within // CHUNK_ROWS * H) * CHUNK_ROWS + b_within % CHUNK_ROWS
    b_scale = (b_first + (FIRST_SCALE + b_within // CHUNK_SCALES) * H) * CHUNK_SCALES + b_within % CHUNK_SCALES
    return b_code, b_scale


# pages differ from event to event: specialising on them would compile in the middle of serving
@triton.jit(do_not_specialize=["num_new_pages"])
def move_kernel(
    rows,
    new_pages,
    counts,
    k,
    v,
    num_condensed,
    first_page,
    condensed_keep,
    condensed_pages,
    num_rows,
    num_slots,
    capacity,
    num_new_pages,
    max_pages,
    H: tl.constexpr,
    COLUMNS: tl.constexpr,
    PS: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    CHUNK_ROWS: tl.constexpr,
    CHUNK_SCALES: tl.constexpr,
    FIRST_SCALE: tl.constexpr,
    WORDS: tl.constexpr,
    SEGMENT: tl.constexpr,
    BN: tl.constexpr,
    BCOL: tl.constexpr,
):
    """Condensed survivors, as words of 32 bits."""
    i_j, i_c, i_segment = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    row = tl.load(rows + i_j).to(tl.int64)
    o_table = ((i_c // H) * num_rows + row) * H + i_c % H
    start = i_segment * SEGMENT
    end = tl.minimum(start + SEGMENT, tl.load(num_condensed + o_table))
    if start < end:
        i_old, i_new = tl.load(first_page + o_table), new_first_page(counts, i_j, i_c, COLUMNS, PAGE_TOKENS, BCOL)
        p_keep = condensed_keep + o_table * capacity
        o_n, o_w = tl.arange(0, BN), tl.arange(0, WORDS)
        # survivors before this segment
        b_before = tl.zeros([BN], tl.int32)
        for i_n in range(0, start, BN):
            b_before += tl.load(p_keep + i_n + o_n, mask=i_n + o_n < start, other=0).to(tl.int32)
        num_moved = tl.sum(b_before, 0)
        for i_n in range(start, end, BN):
            b_index = i_n + o_n
            m_n = tl.load(p_keep + b_index, mask=b_index < end, other=0) != 0
            b_rank = num_moved + tl.cumsum(m_n.to(tl.int32), 0) - 1
            num_moved += tl.sum(m_n.to(tl.int32), 0)
            # a row too many must never land in somebody else's page
            m_n = m_n & ((i_new + b_rank // PAGE_TOKENS) // COLUMNS < num_new_pages)
            b_from, b_from_scale = packed_places(
                b_index, i_old, condensed_pages + row * max_pages, m_n, num_slots,
                H, COLUMNS, PS, PAGE_TOKENS, CHUNK_ROWS, CHUNK_SCALES, FIRST_SCALE,
            )  # fmt: skip
            b_to, b_to_scale = packed_places(
                tl.maximum(b_rank, 0), i_new, new_pages + i_j * num_new_pages, m_n, num_slots,
                H, COLUMNS, PS, PAGE_TOKENS, CHUNK_ROWS, CHUNK_SCALES, FIRST_SCALE,
            )  # fmt: skip
            o_from, o_to = b_from[:, None] * WORDS + o_w[None, :], b_to[:, None] * WORDS + o_w[None, :]
            b_k, b_v = tl.load(k + o_from, mask=m_n[:, None]), tl.load(v + o_from, mask=m_n[:, None])
            b_k_scale, b_v_scale = tl.load(k + b_from_scale, mask=m_n), tl.load(v + b_from_scale, mask=m_n)
            tl.store(k + o_to, b_k, mask=m_n[:, None])
            tl.store(v + o_to, b_v, mask=m_n[:, None])
            tl.store(k + b_to_scale, b_k_scale, mask=m_n)
            tl.store(v + b_to_scale, b_v_scale, mask=m_n)


@triton.jit
def store_quantised(codes, scales, b_x, b_to, b_to_scale, m_n, BN: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr):
    """Rows [BN, D] in float32 as codes (bytes) and scales (float16): `PackedRows.quantise`."""
    STEPS: tl.constexpr = 2**BITS - 1
    o_h = tl.arange(0, D // 2)
    b_low, b_high = tl.min(b_x, 1), tl.max(b_x, 1)
    b_zero = tl.minimum(tl.maximum(b_low, -MOST), MOST).to(tl.float16)
    b_scale = tl.minimum(tl.div_rn(b_high - b_low, tl.full([BN], STEPS, tl.float32)), MOST).to(tl.float16)
    b_size = b_scale.to(tl.float32)
    b_divisor = tl.where(b_size > 0, b_size, 1.0)
    b_steps = tl.div_rn(b_x - b_zero.to(tl.float32)[:, None], tl.broadcast_to(b_divisor[:, None], (BN, D)))
    b_steps = tl.where(b_size[:, None] > 0, tl.floor(b_steps + 0.5), 0.0)
    b_code = tl.minimum(tl.maximum(b_steps, 0.0), 1.0 * STEPS).to(tl.uint8)
    b_first, b_second = split_halves(b_code, BN, D)
    if BITS == 4:
        p_code = codes + b_to[:, None] * (D // 2) + o_h[None, :]
        tl.store(p_code, b_first | (b_second << 4), mask=m_n[:, None])
    else:
        p_code = codes + b_to[:, None] * D + o_h[None, :]
        tl.store(p_code, b_first, mask=m_n[:, None])
        tl.store(p_code + D // 2, b_second, mask=m_n[:, None])
    tl.store(scales + 2 * b_to_scale, b_scale, mask=m_n)
    tl.store(scales + 2 * b_to_scale + 1, b_zero, mask=m_n)


@triton.jit(do_not_specialize=["num_new_pages"])
def quantise_kernel(
    rows,
    new_pages,
    counts,
    k,
    v,
    k_codes,
    v_codes,
    k_scales,
    v_scales,
    key_offset,
    key_scale,
    num_sparse,
    sparse_positions,
    req_to_token,
    num_rows,
    num_slots,
    num_new_pages,
    max_span,
    stride_req,
    H: tl.constexpr,
    D: tl.constexpr,
    LOG2_D: tl.constexpr,
    BITS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PS: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    CHUNK_ROWS: tl.constexpr,
    CHUNK_SCALES: tl.constexpr,
    FIRST_SCALE: tl.constexpr,
    BN: tl.constexpr,
    BCOL: tl.constexpr,
):
    """Sparse tokens, which follow the condensed survivors of their list."""
    i_j, i_c = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = tl.load(rows + i_j).to(tl.int64)
    i_l, i_h = i_c // H, i_c % H
    o_table = (i_l * num_rows + row) * H + i_h
    num_tokens = tl.load(num_sparse + o_table)
    b_index = tl.program_id(2) * BN + tl.arange(0, BN)
    if tl.program_id(2) * BN < num_tokens:
        i_new = new_first_page(counts, i_j, i_c, COLUMNS, PAGE_TOKENS, BCOL)
        b_rank = tl.load(counts + i_j * COLUMNS + i_c) - num_tokens + b_index
        # a row too many must never land in somebody else's page
        m_n = (b_index < num_tokens) & ((i_new + b_rank // PAGE_TOKENS) // COLUMNS < num_new_pages)
        b_to, b_to_scale = packed_places(
            b_rank, i_new, new_pages + i_j * num_new_pages, m_n, num_slots,
            H, COLUMNS, PS, PAGE_TOKENS, CHUNK_ROWS, CHUNK_SCALES, FIRST_SCALE,
        )  # fmt: skip
        b_position = tl.load(sparse_positions + o_table * max_span + b_index, mask=m_n, other=0)
        b_slot = tl.load(req_to_token + row * stride_req + b_position, mask=m_n, other=0).to(tl.int64)
        o_d = tl.arange(0, D)
        o_pool = ((i_l.to(tl.int64) * num_slots + b_slot) * H + i_h)[:, None] * D + o_d[None, :]
        b_k = tl.load(k + o_pool, mask=m_n[:, None], other=0.0).to(tl.float32)
        b_v = tl.load(v + o_pool, mask=m_n[:, None], other=0.0).to(tl.float32)
        b_offset, b_scale = tl.load(key_offset + o_table * D + o_d), tl.load(key_scale + o_table * D + o_d)
        b_k = (b_k - b_offset[None, :]) / b_scale[None, :]
        b_k = rotate(b_k, BN, D, LOG2_D) * (1.0 / D**0.5)
        store_quantised(k_codes, k_scales, b_k, b_to, b_to_scale, m_n, BN, D, BITS)
        store_quantised(v_codes, v_scales, b_v, b_to, b_to_scale, m_n, BN, D, BITS)


@dataclass(frozen=True)
class PackedCopy:
    """Arguments of the two launches, see `condense`."""

    layout: PoolLayout
    tables: DeviceTables
    req_to_token: torch.Tensor
    rows: torch.Tensor
    new_pages: torch.Tensor
    counts: torch.Tensor  # [J, L * H] int32, tokens of the new lists

    def run(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Fill the new pages; sources are not written. Two launches, no sync, deterministic."""
        layout, tables, form = self.layout, self.tables, self.layout.survivors
        (J, P), columns = self.new_pages.shape, layout.columns
        capacity, max_span = tables.condensed_keep.shape[-1], tables.sparse_positions.shape[-1]
        num_rows, H, D = tables.num_condensed.shape[1], layout.num_kv_heads, layout.head_dim
        shape = {
            "H": H, "COLUMNS": columns, "PS": layout.page_size, "PAGE_TOKENS": form.tokens,
            "CHUNK_ROWS": form.rows_per_chunk, "CHUNK_SCALES": form.scales_per_chunk,
            "FIRST_SCALE": form.first_scale_chunk, "BCOL": triton.next_power_of_2(columns),
        }  # fmt: skip
        words = k.view(torch.int32), v.view(torch.int32)
        move_kernel[(J, columns, triton.cdiv(capacity, 512))](
            self.rows, self.new_pages, self.counts, *words, tables.num_condensed, tables.first_page,
            tables.condensed_keep.view(torch.uint8), tables.condensed_pages, num_rows, layout.num_slots, capacity, P,
            tables.condensed_pages.shape[1], WORDS=form.row_bytes // 4, SEGMENT=512, BN=64, num_warps=4, **shape,
        )  # fmt: skip
        quantise_kernel[(J, columns, triton.cdiv(max_span, 32))](
            self.rows, self.new_pages, self.counts, k, v, k.view(torch.uint8), v.view(torch.uint8),
            k.view(torch.float16), v.view(torch.float16), tables.key_offset, tables.key_scale, tables.num_sparse,
            tables.sparse_positions, self.req_to_token, num_rows, layout.num_slots, P, max_span,
            self.req_to_token.stride(0), D=D, LOG2_D=D.bit_length() - 1, BITS=form.bits, BN=32, num_warps=4, **shape,
        )  # fmt: skip
