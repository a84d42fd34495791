"""What is expected of tokens that no observed query looked at, and budgets that are a fixed share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import oracle
import pytest
import torch
from candidate_factory import make_candidates, random_candidates
from hypothesis import given, settings
from hypothesis import strategies as st

from hardkv_sglang.config import HardKVConfig
from hardkv_sglang.selection.importance import measure_importance, output_scores
from hardkv_sglang.selection.policies import make_policy
from hardkv_sglang.selection.top_p import Candidates, Selection

FREE: dict[str, Any] = {"min_tokens": 0, "max_tokens": None}


def scores_of(candidates: Candidates, weight: float) -> torch.Tensor:
    """The output metric, [B, N]."""
    importance = measure_importance(candidates, "mean", "mean")
    return output_scores(importance, candidates, HardKVConfig(prior_weight=weight))[:, 0]


def select(candidates: Candidates, **options: Any) -> Selection:
    return make_policy(HardKVConfig(**{**FREE, **options}), 1).select(candidates)


@settings(max_examples=40, deadline=None)
@given(candidates=random_candidates(), weight=st.sampled_from([0.0, 0.03, 0.1, 0.7, 1.0]))
def test_expected_energy_equals_oracle(candidates: Candidates, weight: float) -> None:
    scores = scores_of(candidates, weight)
    assert not scores.masked_fill(candidates.valid, 0.0).any()
    for b, lst in enumerate(oracle.lists_of(candidates)):
        expected = oracle.expected_energy(lst, weight)
        for j, energy in expected.items():
            assert float(scores[b, j]) == pytest.approx(energy, rel=1e-6, abs=1e-12)


@settings(max_examples=20, deadline=None)
@given(candidates=random_candidates(dtype=torch.float32))
def test_weight_zero_is_the_observed_energy_bit_for_bit(candidates: Candidates) -> None:
    importance = measure_importance(candidates, "mean", "mean")
    distance = candidates.value_distance(importance.mean)
    observed = torch.where(candidates.valid, importance.mean_square * distance, 0.0)
    assert torch.equal(scores_of(candidates, 0.0), observed)


@settings(max_examples=20, deadline=None)
@given(candidates=random_candidates(), weight=st.floats(0.0, 1.0))
def test_the_prior_moves_energy_and_adds_none(candidates: Candidates, weight: float) -> None:
    torch.testing.assert_close(scores_of(candidates, weight).sum(-1), scores_of(candidates, 0.0).sum(-1))


def test_expected_energy_is_permutation_equivariant() -> None:
    candidates = make_candidates(seed=3, counts=[40, 40], padding=0)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(5))
    moved = replace(
        candidates, logits2=candidates.logits2[..., order], attended=candidates.attended[:, order],
        valid=candidates.valid[:, order], values=candidates.values[:, order],
    )  # fmt: skip
    torch.testing.assert_close(scores_of(moved, 0.1), scores_of(candidates, 0.1)[:, order])


def test_an_unobserved_token_with_a_rare_value_may_stay() -> None:
    """Of two tokens without attention the one whose value differs most is kept, ahead of an attended common one."""
    candidates = make_candidates(seed=8, counts=[12], padding=0)
    logits2, values = torch.zeros_like(candidates.logits2), torch.zeros_like(candidates.values)
    logits2[..., 3:5] = -60.0
    values[:, 3], values[:, 4], values[:, :3], values[:, 5:] = 50.0, 0.1, 0.1, -0.1
    candidates = replace(candidates, logits2=logits2, values=values)
    kept = select(candidates, kept_share=1 / 12, prior_weight=0.5).keep
    assert kept[0].nonzero().flatten().tolist() == [3]
    assert not select(candidates, kept_share=1 / 12, prior_weight=0.0).keep[0, 3]


@settings(max_examples=20, deadline=None)
@given(candidates=random_candidates(), share=st.floats(0.01, 1.0))
def test_a_share_keeps_the_best_tokens_of_all_lists(candidates: Candidates, share: float) -> None:
    B, N = candidates.valid.shape
    count = min(int(share * N * B), int(candidates.valid.sum()))
    keep = select(candidates, kept_share=share, prior_weight=0.1).keep
    assert int(keep.sum()) == count
    scores = scores_of(candidates, 0.1)
    dropped = scores[candidates.valid & ~keep]
    if count and dropped.numel():
        assert scores[keep].min() >= dropped.max()


@settings(max_examples=20, deadline=None)
@given(candidates=random_candidates(), low=st.floats(0.01, 1.0), high=st.floats(0.01, 1.0))
def test_shares_are_nested(candidates: Candidates, low: float, high: float) -> None:
    small, large = (select(candidates, kept_share=share).keep for share in sorted((low, high)))
    assert not (small & ~large).any()


@pytest.mark.parametrize("options", [{"policy": "rkv"}, {"budget": "per_head"}, {"budget": "uniform"}], ids=str)
def test_a_share_needs_a_budget_over_all_heads(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="kept_share"):
        HardKVConfig(kept_share=0.2, **options)
