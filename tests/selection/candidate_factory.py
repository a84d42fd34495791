"""Random events for the selection tests: ragged, left-padded lists, poisoned where nothing may be read."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st

from hardkv_sglang.selection.top_p import Candidates

TOP_P = (0.3137, 0.5003, 0.9001, 0.9507, 0.9903)
"""Odd values, so that no random probability sum falls on them: there a rounding error would decide."""


def make_candidates(
    seed: int,
    counts: list[int],
    group: int = 2,
    queries: int = 3,
    valid_queries: int | None = None,
    spread: float = 3.0,
    always: float = 1.0,
    head_dim: int = 4,
    dtype: torch.dtype = torch.float64,
    padding: int = 2,
) -> Candidates:
    """One list of `counts[b]` candidates each, N = max(counts) + padding.

    spread: standard deviation of the logits (bits); always: base-2 logit of all always-kept tokens together.
    About a third of the candidates is not attended. Padding and invalid queries hold NaN, infinities and huge
    numbers.
    """
    g = torch.Generator().manual_seed(seed)
    B, N = len(counts), max(counts) + padding
    logits2 = torch.randn(B, group, queries, N, generator=g, dtype=torch.float64) * spread
    valid = torch.arange(N) >= N - torch.tensor(counts)[:, None]
    attended = valid & (torch.rand(B, N, generator=g) < 0.67)
    keys, values = (torch.randn(B, N, head_dim, generator=g, dtype=torch.float64) for _ in range(2))
    inside = logits2.masked_fill(~attended[:, None, None], -math.inf)
    always_kept = torch.full((B, group, queries, 1), always, dtype=torch.float64)
    lse2 = torch.logsumexp(torch.cat((inside, always_kept), -1) * math.log(2), -1) / math.log(2)
    query_valid = torch.arange(queries) >= queries - (queries if valid_queries is None else valid_queries)

    poison = torch.tensor([math.nan, math.inf, -math.inf, 1e4], dtype=torch.float64)
    poison = poison[torch.randint(4, logits2.shape, generator=g)]
    live = valid[:, None, None] & query_valid[:, None]
    logits2 = torch.where(live, logits2, poison)
    lse2 = torch.where(query_valid, lse2, math.nan)
    keys, values = (torch.where(valid[..., None], x, math.nan) for x in (keys, values))
    attended = attended | ~valid & (torch.rand(B, N, generator=g) < 0.5)
    floats = [x.to(dtype) for x in (logits2, lse2, keys, values)]
    names = ("logits2", "lse2", "keys", "values")
    return Candidates(attended=attended, valid=valid, query_valid=query_valid, **dict(zip(names, floats, strict=True)))


@st.composite
def random_candidates(draw: st.DrawFn, dtype: torch.dtype = torch.float64, min_count: int = 0) -> Candidates:
    """Small events of every shape; at least one query is valid."""
    queries = draw(st.integers(1, 4))
    return make_candidates(
        seed=draw(st.integers(0, 1 << 20)),
        counts=draw(st.lists(st.integers(min_count, 40), min_size=1, max_size=3)),
        group=draw(st.integers(1, 3)),
        queries=queries,
        valid_queries=draw(st.integers(1, queries)),
        spread=draw(st.sampled_from([0.3, 3.0, 9.0])),
        always=draw(st.sampled_from([-20.0, 0.0, 4.0, 12.0])),
        dtype=dtype,
    )
