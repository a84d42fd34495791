"""Candidates of a select event in a pool with packed survivors: condensed rows restored, rows of the span copied.

`reference_packed.read_lists` is the specification. And what packed keys are prepared by: offset and scale of each list,
`packed_rows.key_statistics`.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl

from hardkv_sglang.kernels.list_candidates import CandidateRows
from hardkv_sglang.kernels.packed_decode import load_scales, rotate
from hardkv_sglang.kernels.packed_rows import MOST_SCALE
from hardkv_sglang.lifecycle.step_plan import SelectOp
from hardkv_sglang.memory_pool.rank_memory import RankMemory

MOST = tl.constexpr(MOST_SCALE)
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit
def load_packed(codes, scales, o_code, o_scale, m_n, BN: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr):
    """Packed rows [BN, D] as float32; zeros where masked. `o_code` in bytes, `o_scale` in words."""
    o_h = tl.arange(0, D // 2)
    b_low = tl.load(codes + o_code[:, None] + o_h[None, :], mask=m_n[:, None], other=0)
    if BITS == 4:
        b_high = b_low >> 4
        b_low = b_low & 15
    else:
        b_high = tl.load(codes + o_code[:, None] + (D // 2 + o_h)[None, :], mask=m_n[:, None], other=0)
    b_scale, b_zero = load_scales(scales + o_scale, m_n)
    b_x = tl.permute(tl.join(b_low.to(tl.float32), b_high.to(tl.float32)), (0, 2, 1))
    return tl.reshape(b_x, (BN, D)) * b_scale[:, None] + b_zero[:, None]


# bounds differ from event to event: specialising on them would compile in the middle of serving
@triton.jit(do_not_specialize=["row", "first_layer", "bound", "N"])
def restore_kernel(
    k,
    v,
    k_codes,
    v_codes,
    k_scales,
    v_scales,
    key_offset,
    key_scale,
    rows,
    padding,
    k_restored,
    v_restored,
    row,
    first_layer,
    bound,
    N,
    num_rows,
    H: tl.constexpr,
    D: tl.constexpr,
    LOG2_D: tl.constexpr,
    BITS: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    CHUNK_ROWS: tl.constexpr,
    CHUNK_SCALES: tl.constexpr,
    FIRST_SCALE: tl.constexpr,
    CODE_BYTES: tl.constexpr,
    BN: tl.constexpr,
):
    i_b = tl.program_id(0).to(tl.int64)
    o_n = tl.program_id(1) * BN + tl.arange(0, BN)
    o_d = tl.arange(0, D)
    b_row = tl.load(rows + i_b * N + o_n, mask=o_n < N, other=0)
    b_index = o_n - tl.load(padding + i_b)
    m_condensed = (b_index >= 0) & (o_n < bound)
    m_span = (o_n >= bound) & (o_n < N)
    # the row of the pool that holds a token's codes, and the first one of its head page
    b_within = b_index % PAGE_TOKENS
    o_code = (b_row * CHUNK_ROWS + b_within % CHUNK_ROWS) * CODE_BYTES
    b_scales = b_row + (FIRST_SCALE + b_within // CHUNK_SCALES - b_within // CHUNK_ROWS) * H
    o_scale = b_scales * CHUNK_SCALES + b_within % CHUNK_SCALES
    i_table = ((first_layer + i_b // H) * num_rows + row) * H + i_b % H
    b_k = load_packed(k_codes, k_scales, o_code, o_scale, m_condensed, BN, D, BITS)
    b_k = rotate(b_k, BN, D, LOG2_D) * (1.0 / D**0.5)
    b_k = b_k * tl.load(key_scale + i_table * D + o_d)[None, :] + tl.load(key_offset + i_table * D + o_d)[None, :]
    b_v = load_packed(v_codes, v_scales, o_code, o_scale, m_condensed, BN, D, BITS)
    o_pool = b_row[:, None] * D + o_d[None, :]
    b_k_span = tl.load(k + o_pool, mask=m_span[:, None], other=0.0)
    b_v_span = tl.load(v + o_pool, mask=m_span[:, None], other=0.0)
    b_k = tl.where(m_condensed[:, None], b_k.to(b_k_span.dtype), b_k_span)
    b_v = tl.where(m_condensed[:, None], b_v.to(b_v_span.dtype), b_v_span)
    o_restored = (i_b * N + o_n)[:, None] * D + o_d[None, :]
    tl.store(k_restored + o_restored, b_k, mask=(o_n < N)[:, None])
    tl.store(v_restored + o_restored, b_v, mask=(o_n < N)[:, None])


def restore_candidates(
    memory: RankMemory, op: SelectOp, layers: slice, found: CandidateRows
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of candidates whose condensed tokens are packed, [B * N, D] of the pool's type; 0 where padded.

    found: of `list_candidates` for the same event and layers. One launch, no sync, deterministic.
    """
    layout, tables, form = memory.layout, memory.tables, memory.layout.survivors
    (B, N), D = found.rows.shape, layout.head_dim
    k, v = memory.k_storage, memory.v_storage
    k_restored, v_restored = (torch.empty(B * N, D, dtype=k.dtype, device=k.device) for _ in range(2))
    if B and N:
        restore_kernel[(B, triton.cdiv(N, 32))](
            k, v, k.view(torch.uint8), v.view(torch.uint8), k.view(torch.int32), v.view(torch.int32),
            tables.key_offset, tables.key_scale, found.rows, found.padding, k_restored, v_restored,
            op.row, layers.start, op.condensed_list_bound, N, tables.num_condensed.shape[1],
            H=layout.num_kv_heads, D=D, LOG2_D=D.bit_length() - 1, BITS=form.bits, PAGE_TOKENS=form.tokens,
            CHUNK_ROWS=form.rows_per_chunk, CHUNK_SCALES=form.scales_per_chunk, FIRST_SCALE=form.first_scale_chunk,
            CODE_BYTES=form.row_bytes, BN=32, num_warps=4,
        )  # fmt: skip
    return k_restored, v_restored


@triton.jit
def sum_keys(k, p_slots, b_mean, i_l, i_h, start, end, num_slots, POWER: tl.constexpr, H, D: tl.constexpr, BN):
    """Sum [D] over a list's tokens from `start` up to `end` of their keys less `b_mean`, to a power of 1 or 2."""
    o_d = tl.arange(0, D)
    b_sum = tl.zeros([D], tl.float32)
    for i_n in range(start, end, BN):
        o_n = i_n + tl.arange(0, BN)
        m_n = o_n < end
        b_slot = tl.load(p_slots + o_n, mask=m_n, other=0).to(tl.int64)
        o_key = ((i_l * num_slots + b_slot) * H + i_h)[:, None] * D + o_d[None, :]
        b_k = tl.load(k + o_key, mask=m_n[:, None], other=0.0).to(tl.float32) - b_mean[None, :]
        if POWER == 2:
            b_k = b_k * b_k
        b_sum += tl.sum(tl.where(m_n[:, None], b_k, 0.0), 0)
    return b_sum


@triton.jit
def sum_of_pair(b_x, D: tl.constexpr):
    """Sum over the two channels that RoPE turns together; [D]."""
    b_sum = tl.sum(tl.reshape(b_x, (2, D // 2)), 0)
    return tl.reshape(tl.broadcast_to(b_sum[None, :], (2, D // 2)), (D,))


@triton.jit(do_not_specialize=["row"])
def key_statistics_kernel(
    k,
    req_to_token,
    recent_start,
    key_offset,
    key_scale,
    row,
    num_rows,
    num_slots,
    stride_req,
    H: tl.constexpr,
    D: tl.constexpr,
    BN: tl.constexpr,
):
    i_l, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = tl.cast(row, tl.int64)
    n = tl.load(recent_start + row)
    num_early = (n + 1) // 2
    p_slots = req_to_token + row * stride_req
    b_zero = tl.zeros([D], tl.float32)
    b_early = sum_keys(k, p_slots, b_zero, i_l, i_h, 0, num_early, num_slots, 1, H, D, BN)
    b_late = sum_keys(k, p_slots, b_zero, i_l, i_h, num_early, n, num_slots, 1, H, D, BN)
    b_mean = (b_early + b_late) / tl.maximum(n, 1)
    b_square = sum_keys(k, p_slots, b_mean, i_l, i_h, 0, n, num_slots, 2, H, D, BN) / tl.maximum(n, 1)
    b_shift = b_early / tl.maximum(num_early, 1) - b_late / tl.maximum(n - num_early, 1)
    b_moved, b_size = sum_of_pair(b_shift * b_shift, D), sum_of_pair(b_mean * b_mean, D)
    b_turning = b_moved / tl.maximum(b_moved + b_size, TINY)
    b_spread = tl.sqrt(b_square + b_turning * b_size / 2)
    whole = tl.sqrt(tl.sum(b_spread * b_spread, 0) / D)
    b_scale = tl.sqrt(tl.where(whole > 0, b_spread / tl.where(whole > 0, whole, 1.0), 1.0))
    b_scale = tl.minimum(tl.maximum(b_scale, 1 / MOST), MOST)
    o_table = ((i_l * num_rows + row) * H + i_h) * D + tl.arange(0, D)
    tl.store(key_offset + o_table, tl.where(n < 2, b_mean, b_mean * (1.0 - b_turning)))
    tl.store(key_scale + o_table, tl.where(n < 2, 1.0, b_scale))


def take_statistics(memory: RankMemory, row: int) -> None:
    """Offset and scale of the row's lists, from the keys of all its tokens up to the recent window, in place.

    `reference_packed.take_statistics` is the specification. One launch, no sync, deterministic.
    """
    layout, tables = memory.layout, memory.tables
    key_statistics_kernel[(layout.num_layers, layout.num_kv_heads)](
        memory.k_storage, memory.req_to_token, tables.recent_start, tables.key_offset, tables.key_scale, row,
        tables.num_condensed.shape[1], layout.num_slots, memory.req_to_token.stride(0), H=layout.num_kv_heads,
        D=layout.head_dim, BN=32, num_warps=4,
    )  # fmt: skip
