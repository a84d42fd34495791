"""Floor, cap and page filling of chosen sets, one program per list: `selection.bound_counts` is the specification.

A list's best tokens are found without sorting: scores that are not negative have the order of their bits, so the
threshold is built bit by bit, counting how many candidates reach it.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl

NO_CAP = 2**31 - 1
PASS = 2048  # candidates of a list that are looked at together


@triton.jit
def load_keys(chosen, ranking, valid, i_b, o_n, N, is_full):
    """Order bits of the candidates that compete for the list's places, -1 for the others.

    A list that chose too many keeps some of those; any other keeps them all, and others compete for what is left.
    """
    m_n = o_n < N
    b_chosen = tl.load(chosen + i_b * N + o_n, mask=m_n, other=0) != 0
    b_valid = tl.load(valid + i_b * N + o_n, mask=m_n, other=0) != 0
    b_score = tl.load(ranking + i_b * N + o_n, mask=m_n, other=0.0)
    # minus zero has the sign bit set
    b_key = tl.where(b_score > 0, b_score, 0.0).to(tl.int32, bitcast=True)
    m_rival = tl.where(is_full, b_chosen, b_valid & ~b_chosen)
    return tl.where(m_rival, b_key, -1), b_chosen


# sizes differ from event to event: specialising on them would compile in the middle of serving
@triton.jit(do_not_specialize=["N"])
def bound_kernel(chosen, ranking, valid, keep, N, FLOOR: tl.constexpr, CAP: tl.constexpr, UNIT: tl.constexpr,
                 BN: tl.constexpr):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64)
    b_chosen_sum = tl.zeros([BN], tl.int32)
    b_valid_sum = tl.zeros([BN], tl.int32)
    for i_n in range(0, N, BN):
        o_n = i_n + tl.arange(0, BN)
        b_chosen_sum += (tl.load(chosen + i_b * N + o_n, mask=o_n < N, other=0) != 0).to(tl.int32)
        b_valid_sum += (tl.load(valid + i_b * N + o_n, mask=o_n < N, other=0) != 0).to(tl.int32)
    num_chosen = tl.sum(b_chosen_sum, 0)
    count = tl.cdiv(tl.maximum(num_chosen, FLOOR), UNIT) * UNIT
    count = tl.minimum(count, tl.minimum(tl.sum(b_valid_sum, 0), CAP))
    is_full = count < num_chosen
    places = tl.where(is_full, count, count - num_chosen)
    # the largest threshold that enough rivals reach
    threshold = 0
    for i_bit in range(31):
        higher = threshold | (1 << (30 - i_bit))
        b_reach = tl.zeros([BN], tl.int32)
        for i_n in range(0, N, BN):
            b_key, _ = load_keys(chosen, ranking, valid, i_b, i_n + tl.arange(0, BN), N, is_full)
            b_reach += (b_key >= higher).to(tl.int32)
        threshold = tl.where(tl.sum(b_reach, 0) >= places, higher, threshold)
    b_above = tl.zeros([BN], tl.int32)
    b_equal = tl.zeros([BN], tl.int32)
    for i_n in range(0, N, BN):
        b_key, _ = load_keys(chosen, ranking, valid, i_b, i_n + tl.arange(0, BN), N, is_full)
        b_above += (b_key > threshold).to(tl.int32)
        b_equal += (b_key == threshold).to(tl.int32)
    # of equal scores the later positions stay
    num_skipped = tl.sum(b_equal, 0) - (places - tl.sum(b_above, 0))
    num_equal = 0
    for i_n in range(0, N, BN):
        o_n = i_n + tl.arange(0, BN)
        b_key, b_chosen = load_keys(chosen, ranking, valid, i_b, o_n, N, is_full)
        b_is_equal = (b_key == threshold).to(tl.int32)
        b_rank = num_equal + tl.cumsum(b_is_equal, 0)
        num_equal += tl.sum(b_is_equal, 0)
        b_keep = (b_key > threshold) | ((b_is_equal != 0) & (b_rank > num_skipped))
        b_keep = b_keep | (b_chosen & ~is_full)
        tl.store(keep + i_b * N + o_n, b_keep.to(tl.uint8), mask=o_n < N)


def bound_counts(
    chosen: torch.Tensor, importance: torch.Tensor, valid: torch.Tensor, floor: int, cap: int | None, unit: int = 1
) -> torch.Tensor:
    """See `selection.bound_counts`. importance: float32, compared as such. One launch, no sync, same result."""
    B, N = chosen.shape
    assert chosen.is_contiguous() and valid.is_contiguous(), "chosen and valid [B, N] must be contiguous"
    keep = torch.empty(B, N, dtype=torch.bool, device=chosen.device)
    if B and N:
        bytes_of = (chosen.view(torch.uint8), importance.float().contiguous(), valid.view(torch.uint8))
        bound_kernel[(B,)](
            *bytes_of, keep.view(torch.uint8), N, FLOOR=floor, CAP=NO_CAP if cap is None else cap, UNIT=unit,
            BN=PASS, num_warps=8,
        )  # fmt: skip
    return keep
