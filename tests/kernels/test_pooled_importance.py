"""Importance measured in the pool equals the torch definition."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

from hardkv_sglang.kernels.importance import SEGMENT, PooledLists, measure_pooled
from hardkv_sglang.selection.importance import measure_importance
from hardkv_sglang.selection.top_p import Candidates

SCALE2 = 0.125 * math.log2(math.e)
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()  # numpy has no bfloat16 dot
TOLERANCE = 2e-6  # for all: products of 16-bit numbers are exact in float32


@dataclass(frozen=True)
class Event:
    """A pool whose unused rows hold NaN, and one event's lists over it."""

    lists: PooledLists
    attended: torch.Tensor
    queries: torch.Tensor  # [B, M, D]
    lse2: torch.Tensor

    def candidates(self) -> Candidates:
        """The same in float64, keys and values copied."""
        keys, values = (x[self.lists.rows].double() for x in (self.lists.k_rows, self.lists.v_rows))
        logits2 = self.queries.double() @ keys.transpose(1, 2) * SCALE2
        M = self.queries.shape[1]
        return Candidates(
            logits2=logits2[:, None],
            lse2=self.lse2.double()[:, None],
            attended=self.attended,
            valid=self.lists.valid,
            query_valid=torch.ones(M, dtype=torch.bool, device=logits2.device),
            values=values,
        )


def make_event(counts: list[int], num_queries: int, head_dim: int, dtype: torch.dtype, device: str) -> Event:
    """Lists of `counts` candidates, left-padded to the longest and one more."""
    g = torch.Generator().manual_seed(sum(counts) + num_queries)
    B, N = len(counts), max(counts) + 1
    padding = N - torch.tensor(counts, dtype=torch.int32)
    valid = torch.arange(N) >= padding[:, None]
    order = torch.randperm(B * N + 7, generator=g)
    rows = torch.where(valid, order[: B * N].view(B, N), order[-1])
    k, v = (torch.full((B * N + 7, head_dim), math.nan, dtype=dtype) for _ in range(2))
    for storage in (k, v):
        storage[rows[valid]] = torch.randn(int(valid.sum()), head_dim, generator=g).to(dtype)
    queries = (torch.randn(B, num_queries, head_dim, generator=g) * 2).to(dtype)
    attended = ~valid | (torch.rand(B, N, generator=g) < 0.6)
    logits2 = (queries.float() @ k[rows].float().transpose(1, 2)) * SCALE2
    inside = logits2.masked_fill(~(attended & valid)[:, None], -math.inf)
    # something always kept, as in every real event
    always = torch.randn(B, num_queries, 1, generator=g)
    lse2 = torch.logsumexp(torch.cat((inside, always), -1) * math.log(2), -1) / math.log(2)
    k, v, rows, padding, valid, attended, queries, lse2 = (
        x.to(device) for x in (k, v, rows, padding, valid, attended, queries, lse2)
    )
    return Event(PooledLists(valid, k_rows=k, v_rows=v, rows=rows, padding=padding), attended, queries, lse2)


COUNTS = ([0], [1, 31, 32, 33], [63, 64, 65, 0], [SEGMENT - 1, SEGMENT, SEGMENT + 1, 5])


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("num_queries", [1, 17, 96])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pooled_importance_is_the_mean_attention(device, counts, num_queries, dtype) -> None:
    event = make_event(counts, num_queries, 64, dtype, device)
    found = measure_pooled(event.lists, event.attended, event.queries, event.lse2, SCALE2)
    expected = measure_importance(event.candidates(), "mean", "mean")
    for name in ("distributions", "mean", "mean_square"):
        torch.testing.assert_close(
            getattr(found, name).double(), getattr(expected, name), rtol=1e-4, atol=TOLERANCE, msg=name
        )
    assert found.observed.item()


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize(("head_dim", "dtype"), [(64, torch.float32), (128, torch.float16)])
def test_pooled_value_distance(device, counts, head_dim, dtype) -> None:
    event = make_event(counts, 4, head_dim, dtype, device)
    weights = torch.rand(event.lists.rows.shape, device=device).masked_fill(~event.lists.valid, 0.0)
    found = event.lists.value_distance(weights)
    expected = event.candidates().value_distance(weights.double())
    valid = event.lists.valid
    torch.testing.assert_close(found[valid].double(), expected[valid], rtol=1e-4, atol=1e-5)


def test_unattended_candidates_far_above_the_lse(device) -> None:
    event = make_event([70, 3], 5, 64, torch.float32, device)
    # what the queries did not attend outweighs all they did
    low = Event(event.lists, event.attended, event.queries, event.lse2 - 300.0)
    found = measure_pooled(low.lists, low.attended, low.queries, low.lse2, SCALE2)
    expected = measure_importance(low.candidates(), "mean", "mean")
    torch.testing.assert_close(found.mean.double(), expected.mean, rtol=1e-4, atol=TOLERANCE)
    assert found.mean.isfinite().all()


def test_nothing_observed(device) -> None:
    event = make_event([5, 2], 0, 64, torch.float32, device)
    found = measure_pooled(event.lists, event.attended, event.queries, event.lse2, SCALE2)
    assert not found.observed.item()
    assert not found.mean.any()


def test_same_bits_twice(device) -> None:
    event = make_event([200, 650, 0], 33, 64, torch.float16, device)
    first, second = (measure_pooled(event.lists, event.attended, event.queries, event.lse2, SCALE2) for _ in range(2))
    assert torch.equal(first.mean, second.mean)
    assert torch.equal(first.mean_square, second.mean_square)
