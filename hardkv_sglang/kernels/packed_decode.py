"""Decode attention over lists whose condensed tokens are packed into fewer bits; otherwise as `ragged_decode`.

Codes stay integers in the dot products: a token's scale and zero are applied to its logit, and to its weight before the
sum over values. Keys are as `packed_rows.prepare_keys` left them, so the query is prepared, once per split. Rows are
read as words of 16 bits, and every place of a word has a dot product of its own: no code leaves its register.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from hardkv_sglang.kernels.dependent_launch import launch_options, wait_for_previous
from hardkv_sglang.kernels.merge import EMPTY, State, join_split
from hardkv_sglang.kernels.ragged_decode import attend_block
from hardkv_sglang.kernels.ragged_plan import load_item
from hardkv_sglang.kernels.ragged_workspace import RaggedWorkspace, Tuning
from hardkv_sglang.memory_pool.layout import PoolLayout
from hardkv_sglang.memory_pool.tables import DeviceTables


@triton.jit
def split_halves(b_x, BM: tl.constexpr, D: tl.constexpr):
    """Columns [BM, D / 2] of the first and of the second half."""
    return tl.split(tl.permute(tl.reshape(b_x, (BM, 2, D // 2)), (0, 2, 1)))


@triton.jit
def split_pairs(b_x, BM: tl.constexpr, D: tl.constexpr):
    """Even and odd columns, [BM, D / 2] each."""
    return tl.split(tl.reshape(b_x, (BM, D // 2, 2)))


@triton.jit
def join_pairs(b_even, b_odd, BM: tl.constexpr, D: tl.constexpr):
    """[BM, D] again."""
    return tl.reshape(tl.join(b_even, b_odd), (BM, D))


@triton.jit
def split_codes(b_x, BM: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr):
    """Columns [BM, D] as tuple of [BM, D * BITS / 16], in the order of the codes of a word."""
    if BITS == 8:
        return split_pairs(b_x, BM, D)
    else:  # noqa: RET505 - the compiler takes one branch only of if and else
        b_first, b_second = split_halves(b_x, BM, D)
        b_0, b_2 = split_pairs(b_first, BM, D // 2)
        b_1, b_3 = split_pairs(b_second, BM, D // 2)
        return b_0, b_1, b_2, b_3


@triton.jit
def join_codes(b_parts, BM: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr):
    """[BM, D] again."""
    if BITS == 8:
        b_x = join_pairs(b_parts[0], b_parts[1], BM, D)
    else:
        b_first = join_pairs(b_parts[0], b_parts[2], BM, D // 2)
        b_second = join_pairs(b_parts[1], b_parts[3], BM, D // 2)
        b_x = tl.reshape(tl.permute(tl.join(b_first, b_second), (0, 2, 1)), (BM, D))
    return b_x


@triton.jit
def rotate(b_x, BM: tl.constexpr, D: tl.constexpr, LOG2_D: tl.constexpr):
    """Rows [BM, D] by `packed_rows.rotation` times the root of D: each step turns the top bit of the column number."""
    for _ in tl.static_range(LOG2_D):
        b_first, b_second = split_halves(b_x, BM, D)
        b_x = join_pairs(b_first + b_second, b_first - b_second, BM, D)
    return b_x


@triton.constexpr_function
def unpack_asm(place: int, bits: int) -> str:
    """Two codes of a register that holds two words, as the low bits of the mantissa of 1024, less 1024."""
    mask = "0x000f000f" if bits == 4 else "0x00ff00ff"
    return (
        f"{{ .reg .b32 t, c; shr.u32 t, $1, {place * bits}; lop3.b32 t, t, {mask}, 0x64006400, 0xea; "
        "mov.b32 c, 0x64006400; sub.rn.f16x2 $0, t, c; }"
    )


@triton.jit
def code(b_word, PLACE: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr, PACKED: tl.constexpr):
    """Codes at one place of words (int16), as numbers. PACKED: two at a time; conversion is slower than arithmetic."""
    if PACKED:
        b_x = tl.inline_asm_elementwise(unpack_asm(PLACE, BITS), "=r,r", [b_word], tl.float16, is_pure=True, pack=2)
    else:
        b_x = ((b_word.to(tl.uint16, bitcast=True) >> PLACE * BITS) & ((1 << BITS) - 1)).to(KIND)
    return b_x


@triton.jit
def dot_codes(b_q, b_word, BITS: tl.constexpr, KIND: tl.constexpr, PACKED: tl.constexpr):
    """Queries (tuple by place) times the codes of words [BN, D * BITS / 16]: [BM, BN]."""
    b_word = tl.trans(b_word)
    b_s = tl.dot(b_q[0], code(b_word, 0, BITS, KIND, PACKED), input_precision="ieee")
    for PLACE in tl.static_range(1, 16 // BITS):
        b_s = tl.dot(b_q[PLACE], code(b_word, PLACE, BITS, KIND, PACKED), b_s, input_precision="ieee")
    return b_s


@triton.jit
def add_codes(b_acc, b_old, b_p, b_word, PLACE: tl.constexpr, BITS: tl.constexpr, KIND, PACKED: tl.constexpr):
    """Sums [BM, D * BITS / 16] times `b_old`, plus weights [BM, BN] times the codes at one place of words."""
    return tl.dot(b_p, code(b_word, PLACE, BITS, KIND, PACKED), b_acc * b_old[:, None], input_precision="ieee")


@triton.jit
def load_scales(p_row, m_n):
    """Scales and zeros [BN] of rows at `p_row` (pointers to both, as one word)."""
    b_word = tl.load(p_row, mask=m_n, other=0)
    b_scale = (b_word & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
    b_zero = ((b_word >> 16) & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
    return b_scale.to(tl.float32), b_zero.to(tl.float32)


@triton.jit
def weigh(b_s, m_n, b_top, b_total):
    """Online softmax of logits in base 2: weights, factor of what came before, new maximum and sum."""
    b_s = tl.where(m_n[None, :], b_s, EMPTY)
    b_new = tl.maximum(b_top, tl.max(b_s, 1))
    b_old = tl.exp2(b_top - b_new)
    b_p = tl.exp2(b_s - b_new[:, None])
    return b_p, b_old, b_new, b_total * b_old + tl.sum(b_p, 1)


@triton.jit(do_not_specialize=["i_l"])
def packed_decode_kernel(
    q,
    k,
    v,
    k_words,
    v_words,
    k_scales,
    v_scales,
    key_offset,
    key_scale,
    o,
    lse2,
    items,
    num_items,
    partial_o,
    partial_lse2,
    arrivals,
    condensed_pages,
    sparse_positions,
    req_to_token,
    scale_log2,
    i_l,
    max_items,
    num_rows,
    num_slots,
    max_pages,
    max_span,
    stride_q,
    stride_req,
    G: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    LOG2_D: tl.constexpr,
    COLUMNS: tl.constexpr,
    PS: tl.constexpr,
    BITS: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    CHUNK_ROWS: tl.constexpr,
    CHUNK_SCALES: tl.constexpr,
    FIRST_SCALE: tl.constexpr,
    KIND: tl.constexpr,
    PACKED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BG: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        wait_for_previous()
    i_l = tl.cast(i_l, tl.int64)
    WORDS: tl.constexpr = D * BITS // 16  # of a row
    o_m, o_n, o_d = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, D)
    m_m = o_m < G
    # words from a block's first to those of its rows
    o_code = ((o_n // CHUNK_ROWS * H * CHUNK_ROWS + o_n % CHUNK_ROWS) * WORDS)[:, None] + tl.arange(0, WORDS)[None, :]
    # fields are read one item ahead, which may be a stale item past the last: a valid address, never used
    item = load_item(items, i_l * max_items + tl.program_id(0))
    for i_item in range(tl.program_id(0), tl.load(num_items + i_l), tl.num_programs(0)):
        i_list, row, start, end, num_condensed, first_page, first_item, num_splits = item
        item = load_item(items, i_l * max_items + tl.minimum(i_item + tl.num_programs(0), max_items - 1))
        i_b, i_h = (i_list // H).to(tl.int64), i_list % H
        i_table = (i_l * num_rows + row) * H + i_h
        p_pages = condensed_pages + row * max_pages
        p_positions = sparse_positions + i_table * max_span
        p_slots = req_to_token + row * stride_req
        p_q = q + i_b * stride_q + (i_h * G + o_m)[:, None] * D + o_d[None, :]
        b_top = tl.full([BM], EMPTY, tl.float32)
        b_total = tl.zeros([BM], tl.float32)
        b_acc = tl.zeros([BM, D], tl.float32)
        end_condensed = tl.minimum(end, num_condensed)
        start_sparse, end_sparse = tl.maximum(start - num_condensed, 0), end - num_condensed
        # what a block needs to find its tokens is loaded one block before: no block waits for it
        b_index = start_sparse + o_n
        b_position = tl.load(p_positions + b_index, mask=b_index < end_sparse, other=0)
        b_slot = tl.load(p_slots + b_position, mask=b_index < end_sparse, other=0)
        if start < end_condensed:
            # a split starts at a head page, and takes whole ones up to the list's end
            i_sequence = first_page + start // PAGE_TOKENS
            page = tl.load(p_pages + i_sequence // COLUMNS)
            b_q = tl.load(p_q, mask=m_m[:, None], other=0.0).to(tl.float32) * scale_log2
            b_constant = tl.sum(b_q * tl.load(key_offset + i_table * D + o_d)[None, :], 1)
            b_q = rotate(b_q * tl.load(key_scale + i_table * D + o_d)[None, :], BM, D, LOG2_D) * (1.0 / D**0.5)
            # of the rounded query, so that it belongs to the same dot products
            b_sum = tl.sum(b_q.to(KIND).to(tl.float32), 1)
            b_qc = split_codes(b_q.to(KIND), BM, D, BITS)
            b_zeros = tl.zeros([BM], tl.float32)
            b_0, b_1 = tl.zeros([BM, WORDS], tl.float32), tl.zeros([BM, WORDS], tl.float32)
            b_2, b_3 = b_0, b_1
            BLOCKS: tl.constexpr = (PAGE_TOKENS + BN - 1) // BN  # of a head page
            num_blocks = tl.cdiv(end_condensed - start, PAGE_TOKENS) * BLOCKS
            for i_block in range(num_blocks):
                i_row = i_block % BLOCKS * BN
                # unused memory may hold NaN: it must not be read even with weight zero
                num_live = tl.minimum(PAGE_TOKENS, end_condensed - start - i_block // BLOCKS * PAGE_TOKENS) - i_row
                m_n = o_n < num_live
                i_column = i_sequence % COLUMNS
                # chunks of a head page lie H rows of the pool apart
                i_first = ((i_column // H).to(tl.int64) * num_slots + page.to(tl.int64) * PS) * H + i_column % H
                i_code = (i_first + i_row // CHUNK_ROWS * H) * CHUNK_ROWS * WORDS
                i_scale = (i_first + (FIRST_SCALE + i_row // CHUNK_SCALES) * H) * CHUNK_SCALES + i_row % CHUNK_SCALES
                b_k = tl.load(k_words + i_code + o_code, mask=m_n[:, None], other=0)
                b_k_scale, b_k_zero = load_scales(k_scales + i_scale + o_n, m_n)
                b_v = tl.load(v_words + i_code + o_code, mask=m_n[:, None], other=0)
                b_v_scale, b_v_zero = load_scales(v_scales + i_scale + o_n, m_n)
                i_sequence = first_page + start // PAGE_TOKENS + (i_block + 1) // BLOCKS
                page = tl.load(p_pages + i_sequence // COLUMNS, mask=i_block + 1 < num_blocks, other=0)
                b_s = dot_codes(b_qc, b_k, BITS, KIND, PACKED) * b_k_scale[None, :]
                b_s += b_sum[:, None] * b_k_zero[None, :] + b_constant[:, None]
                b_p, b_old, b_top, b_total = weigh(b_s, m_n, b_top, b_total)
                b_zeros = b_zeros * b_old + tl.sum(b_p * b_v_zero[None, :], 1)
                b_p = (b_p * b_v_scale[None, :]).to(KIND)
                b_0 = add_codes(b_0, b_old, b_p, b_v, 0, BITS, KIND, PACKED)
                b_1 = add_codes(b_1, b_old, b_p, b_v, 1, BITS, KIND, PACKED)
                if BITS == 4:
                    b_2 = add_codes(b_2, b_old, b_p, b_v, 2, BITS, KIND, PACKED)
                    b_3 = add_codes(b_3, b_old, b_p, b_v, 3, BITS, KIND, PACKED)
            b_acc = join_codes((b_0, b_1, b_2, b_3), BM, D, BITS) + b_zeros[:, None]
        if start_sparse < end_sparse:
            b_q_pool = tl.load(p_q, mask=m_m[:, None], other=0.0)
            b_index += BN
            b_position = tl.load(p_positions + b_index, mask=b_index < end_sparse, other=0)
            for i_n in range(start_sparse, end_sparse, BN):
                m_n = i_n + o_n < end_sparse
                o_kv = ((i_l * num_slots + b_slot) * H + i_h)[:, None] * D + o_d[None, :]
                b_k_pool = tl.load(k + o_kv, mask=m_n[:, None], other=0.0)
                b_v_pool = tl.load(v + o_kv, mask=m_n[:, None], other=0.0)
                b_index = i_n + BN + o_n
                b_slot = tl.load(p_slots + b_position, mask=b_index < end_sparse, other=0)
                b_index += BN
                b_position = tl.load(p_positions + b_index, mask=b_index < end_sparse, other=0)
                b_top, b_total, b_acc = attend_block(
                    b_q_pool, b_k_pool, b_v_pool, m_n, b_top, b_total, b_acc, scale_log2
                )  # fmt: skip
        b_o = b_acc * (1.0 / b_total)[:, None]
        join_split(
            b_o, b_top + tl.log2(b_total), o, lse2, partial_o, partial_lse2, arrivals,
            i_item, i_list, first_item, num_splits, G, D, BM, BG,
        )  # fmt: skip


def packed_decode(
    workspace: RaggedWorkspace,
    layout: PoolLayout,
    tables: DeviceTables,
    req_to_token: torch.Tensor,
    k_storage: torch.Tensor,
    v_storage: torch.Tensor,
    layer: int,
    q: torch.Tensor,
    scale: float,
    state: State,
    tuning: Tuning | None = None,
) -> None:
    """As `ragged_decode` for a layout with packed survivors: same arguments, shapes and guarantees.

    Logits of condensed tokens come from codes and queries in float16, or float32 for a pool of that type. Values times
    their scale are weights in the same type.
    """
    B, HQ, D = q.shape
    H, form = layout.num_kv_heads, layout.survivors
    assert form.is_packed and form.element_bytes == k_storage.element_size(), "the layout is of another pool"
    assert state[0].is_contiguous() and state[1].is_contiguous(), "the state must be contiguous"
    assert state[0].shape == q.shape and state[1].dtype == torch.float32, "o: shape of q; lse2: float32"
    assert k_storage.is_contiguous() and v_storage.is_contiguous(), "the pool must be contiguous"
    assert q.stride(2) == 1 and q.stride(1) == D and D in (64, 128, 256), "q must be [B, HQ, D], D 64, 128 or 256"
    assert q.dtype == k_storage.dtype == v_storage.dtype, "q and the pool must have one dtype"
    assert tables.condensed_pages.is_contiguous() and tables.sparse_positions.is_contiguous(), "tables: contiguous"
    assert tables.key_offset.is_contiguous() and tables.key_scale.is_contiguous(), "tables: contiguous"
    assert req_to_token.stride(1) == 1 and workspace.max_lists >= B * H, "batch exceeds the workspace"
    tuning = tuning or Tuning.default(form.row_bytes, B * H, workspace.num_multiprocessors)
    kind = tl.float32 if q.dtype == torch.float32 else tl.float16
    programs = workspace.num_multiprocessors * tuning.programs_per_multiprocessor
    packed_decode_kernel[(min(programs, B * H * workspace.max_splits),)](
        q,
        k_storage,
        v_storage,
        k_storage.view(torch.int16),
        v_storage.view(torch.int16),
        k_storage.view(torch.int32),
        v_storage.view(torch.int32),
        tables.key_offset,
        tables.key_scale,
        *state,
        workspace.items,
        workspace.num_items,
        workspace.partial_o,
        workspace.partial_lse2,
        workspace.arrivals,
        tables.condensed_pages,
        tables.sparse_positions,
        req_to_token,
        scale_log2=scale * math.log2(math.e),
        i_l=layer,
        max_items=workspace.items.shape[1],
        num_rows=tables.num_condensed.shape[1],
        num_slots=layout.num_slots,
        max_pages=tables.condensed_pages.shape[1],
        max_span=tables.sparse_positions.shape[-1],
        stride_q=q.stride(0),
        stride_req=req_to_token.stride(0),
        G=HQ // H,
        H=H,
        D=D,
        LOG2_D=D.bit_length() - 1,
        COLUMNS=layout.columns,
        PS=layout.page_size,
        BITS=form.bits,
        PAGE_TOKENS=form.tokens,
        CHUNK_ROWS=form.rows_per_chunk,
        CHUNK_SCALES=form.scales_per_chunk,
        FIRST_SCALE=form.first_scale_chunk,
        KIND=kind,
        PACKED=kind == tl.float16 and isinstance(packed_decode_kernel, JITFunction),
        BM=max(16, triton.next_power_of_2(HQ // H)),
        BN=tuning.block_tokens,
        BG=triton.next_power_of_2(HQ // H),
        num_warps=tuning.num_warps,
        num_stages=tuning.num_stages,
        **launch_options(q.device),
    )
