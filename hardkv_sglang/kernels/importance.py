"""Importance of a select event's candidates without their logits in memory.

`importance.measure_importance` with the mean over query heads and queries, and `Lists.value_distance`, are the
specification. Keys are read twice: the first pass finds what each query's probabilities sum to, the second adds
them up per candidate; values likewise. Every sum has a fixed order, so the same inputs give the same bits.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from hardkv_sglang.selection.importance import Importance
from hardkv_sglang.selection.top_p import Lists

SEGMENT = 512  # candidates of one program that sums


@triton.jit
def load_queries(queries, i_b, o_m, m_m, M, D: tl.constexpr):
    """Queries `o_m` of list `i_b`, [BM, D]."""
    o_query = (i_b * M + o_m)[:, None] * D + tl.arange(0, D)[None, :]
    return tl.load(queries + o_query, mask=m_m[:, None], other=0.0)


@triton.jit
def load_rows(storage, rows, i_b, o_n, m_n, N, D: tl.constexpr):
    """Storage rows of candidates `o_n` of list `i_b`, [BN, D]; zeros where masked."""
    b_row = tl.load(rows + i_b * N + o_n, mask=m_n, other=0)
    return tl.load(storage + b_row[:, None] * D + tl.arange(0, D)[None, :], mask=m_n[:, None], other=0.0)


# sizes differ from event to event: specialising on them would compile in the middle of serving
@triton.jit(do_not_specialize=["M", "N", "S"])
def weigh_kernel(
    k,
    rows,
    attended,
    padding,
    queries,
    lse2,
    partial_max,
    partial_attended,
    partial_all,
    scale2,
    M,
    N,
    S,
    D: tl.constexpr,
    SEGMENT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    i_b, i_s, i_m = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    o_m = i_m * BM + tl.arange(0, BM)
    m_m = o_m < M
    b_q = load_queries(queries, i_b, o_m, m_m, M, D)
    b_lse2 = tl.load(lse2 + i_b * M + o_m, mask=m_m, other=0.0)
    first = tl.load(padding + i_b)
    # a candidate outside the LSE may exceed it; 0 stands for everything inside
    b_max = tl.zeros([BM], tl.float32)
    b_attended = tl.zeros([BM], tl.float32)
    b_all = tl.zeros([BM], tl.float32)
    start = i_s * SEGMENT
    end = tl.minimum(start + SEGMENT, N)
    # whole tiles of padding are skipped
    for i_n in range(tl.maximum(start, first // BN * BN), end, BN):
        o_n = i_n + tl.arange(0, BN)
        m_n = (o_n < end) & (o_n >= first)
        b_k = load_rows(k, rows, i_b, o_n, m_n, N, D)
        b_inside = tl.load(attended + i_b * N + o_n, mask=m_n, other=0) != 0
        # [BM, BN] base-2 logits relative to the query's LSE
        b_w = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale2 - b_lse2[:, None]
        b_w = tl.where(m_n[None, :], b_w, float("-inf"))
        b_new_max = tl.maximum(b_max, tl.max(b_w, 1))
        b_rescale = tl.exp2(b_max - b_new_max)
        b_p = tl.exp2(b_w - b_new_max[:, None])
        b_all = b_all * b_rescale + tl.sum(b_p, 1)
        b_attended = b_attended * b_rescale + tl.sum(tl.where(b_inside[None, :], b_p, 0.0), 1)
        b_max = b_new_max
    o_partial = (i_b * S + i_s) * M + o_m
    tl.store(partial_max + o_partial, b_max, mask=m_m)
    tl.store(partial_attended + o_partial, b_attended, mask=m_m)
    tl.store(partial_all + o_partial, b_all, mask=m_m)


@triton.jit(do_not_specialize=["M", "N"])
def importance_kernel(
    k,
    rows,
    padding,
    queries,
    shift2,
    mean,
    mean_square,
    scale2,
    M,
    N,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    i_b, i_n = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_n = i_n * BN + tl.arange(0, BN)
    m_n = (o_n < N) & (o_n >= tl.load(padding + i_b))
    b_k = load_rows(k, rows, i_b, o_n, m_n, N, D)
    b_sum = tl.zeros([BN], tl.float32)
    b_square = tl.zeros([BN], tl.float32)
    for i_m in range(0, M, BM):
        o_m = i_m + tl.arange(0, BM)
        m_m = o_m < M
        b_q = load_queries(queries, i_b, o_m, m_m, M, D)
        b_shift2 = tl.load(shift2 + i_b * M + o_m, mask=m_m, other=0.0)
        # [BM, BN] probabilities over all live tokens
        b_p = tl.exp2(tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale2 - b_shift2[:, None])
        b_p = tl.where(m_m[:, None] & m_n[None, :], b_p, 0.0)
        b_sum += tl.sum(b_p, 0)
        b_square += tl.sum(b_p * b_p, 0)
    tl.store(mean + i_b * N + o_n, b_sum / M, mask=o_n < N)
    tl.store(mean_square + i_b * N + o_n, b_square / M, mask=o_n < N)


@triton.jit(do_not_specialize=["N", "S"])
def value_sum_kernel(
    v, rows, padding, weights, partial_sum, partial_total, N, S, D: tl.constexpr, SEGMENT: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    i_b, i_s = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first = tl.load(padding + i_b)
    start = i_s * SEGMENT
    end = tl.minimum(start + SEGMENT, N)
    b_sum = tl.zeros([D], tl.float32)
    b_total = tl.zeros([BN], tl.float32)
    for i_n in range(tl.maximum(start, first // BN * BN), end, BN):
        o_n = i_n + tl.arange(0, BN)
        m_n = (o_n < end) & (o_n >= first)
        b_weight = tl.load(weights + i_b * N + o_n, mask=m_n, other=0.0)
        b_v = load_rows(v, rows, i_b, o_n, m_n, N, D).to(tl.float32)
        b_sum += tl.sum(b_v * b_weight[:, None], 0)
        b_total += b_weight
    tl.store(partial_sum + (i_b * S + i_s) * D + tl.arange(0, D), b_sum)
    tl.store(partial_total + i_b * S + i_s, tl.sum(b_total, 0))


@triton.jit(do_not_specialize=["N", "S"])
def value_distance_kernel(
    v, rows, padding, partial_sum, partial_total, distance, N, S, D: tl.constexpr, BN: tl.constexpr
):
    i_b, i_n = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b_sum = tl.zeros([D], tl.float32)
    total = 0.0
    for i_s in range(S):
        b_sum += tl.load(partial_sum + (i_b * S + i_s) * D + tl.arange(0, D))
        total += tl.load(partial_total + i_b * S + i_s)
    b_mean = b_sum / tl.where(total > 0, total, 1.0)
    o_n = i_n * BN + tl.arange(0, BN)
    m_n = (o_n < N) & (o_n >= tl.load(padding + i_b))
    b_change = load_rows(v, rows, i_b, o_n, m_n, N, D).to(tl.float32) - b_mean[None, :]
    tl.store(distance + i_b * N + o_n, tl.sum(b_change * b_change, 1), mask=o_n < N)


@dataclass(frozen=True, kw_only=True)
class PooledLists(Lists):
    """Lists whose keys and values stay in the pool."""

    k_rows: torch.Tensor  # [L * S * H, D]
    v_rows: torch.Tensor  # [L * S * H, D]
    rows: torch.Tensor  # [B, N] int64, rows of both; valid addresses where padded
    padding: torch.Tensor  # [B] int32, entries before a list's first candidate

    def head(self, num_candidates: int) -> PooledLists:
        """The lists without what stands behind their first `num_candidates` entries."""
        valid, rows = (x[:, :num_candidates].contiguous() for x in (self.valid, self.rows))
        keys = None if self.keys is None else self.keys[:, :num_candidates]
        return replace(self, valid=valid, rows=rows, keys=keys)

    def value_distance(self, weights: torch.Tensor) -> torch.Tensor:
        """See `Lists.value_distance`; float32. Two launches, no sync, deterministic."""
        (B, N), D = self.rows.shape, self.v_rows.shape[1]
        S, device = max(1, triton.cdiv(N, SEGMENT)), weights.device
        distance = torch.empty(B, N, dtype=torch.float32, device=device)
        if B and N:
            partial_sum = torch.empty(B, S, D, dtype=torch.float32, device=device)
            partial_total = torch.empty(B, S, dtype=torch.float32, device=device)
            value_sum_kernel[(B, S)](
                self.v_rows, self.rows, self.padding, weights.contiguous(), partial_sum, partial_total, N, S, D=D,
                SEGMENT=SEGMENT, BN=64, num_warps=4,
            )  # fmt: skip
            value_distance_kernel[(B, triton.cdiv(N, 64))](
                self.v_rows, self.rows, self.padding, partial_sum, partial_total, distance, N, S, D=D, BN=64,
                num_warps=4,
            )  # fmt: skip
        return distance


def measure_pooled(
    lists: PooledLists, attended: torch.Tensor, queries: torch.Tensor, lse2: torch.Tensor, scale2: float
) -> Importance:
    """Mean attention of valid queries to the candidates: `measure_importance(..., "mean", "mean")`.

    attended: [B, N] bool; queries: [B, M, D], all observation queries of all query heads of the KV head; lse2: [B, M]
    float32, their base-2 LSE; scale2: softmax scale * log2(e). M may be 0: nothing is observed then.
    Returns float32. Two launches, no sync, deterministic; N = 0 and lists of padding give zeros.
    """
    (B, N), (M, D) = lists.rows.shape, queries.shape[1:]
    device, S = queries.device, max(1, triton.cdiv(N, SEGMENT))
    assert lists.rows.is_contiguous() and attended.is_contiguous(), "rows and attended [B, N]"
    assert queries.is_contiguous() and lse2.is_contiguous(), "queries [B, M, D], lse2 [B, M]"
    mean, mean_square = (torch.zeros(B, N, dtype=torch.float32, device=device) for _ in range(2))
    if B and N and M:
        top, inside, everything = (torch.empty(B, S, M, dtype=torch.float32, device=device) for _ in range(3))
        block = min(64, max(16, triton.next_power_of_2(M)))
        weigh_kernel[(B, S, triton.cdiv(M, block))](
            lists.k_rows, lists.rows, attended.view(torch.uint8), lists.padding, queries, lse2, top, inside, everything,
            scale2, M, N, S, D=D, SEGMENT=SEGMENT, BM=block, BN=64, num_warps=4,
        )  # fmt: skip
        shift2 = lse2 + total_log2(top, inside, everything)
        importance_kernel[(B, triton.cdiv(N, 64))](
            lists.k_rows, lists.rows, lists.padding, queries, shift2, mean, mean_square, scale2, M, N,
            D=D, BM=block, BN=64, num_warps=4,
        )  # fmt: skip
    return Importance(mean[:, None], mean, mean_square, torch.full((), M > 0, device=device))


def total_log2(top: torch.Tensor, inside: torch.Tensor, everything: torch.Tensor) -> torch.Tensor:
    """Base-2 logarithm of what a query's weights 2 ** (logit - lse) sum to over all live tokens, [B, M] float32.

    Per segment ([B, S, M]): the largest logit or 0, and the weights below it of attended and of all candidates.
    """
    highest = top.amax(1)
    rescale = torch.exp2(top - highest[:, None])
    attended, candidates = (inside * rescale).sum(1), (everything * rescale).sum(1)
    always = (torch.exp2(-highest) - attended).clamp(min=0.0)
    return highest + (always + candidates).log2()
