from __future__ import annotations

import math
from dataclasses import replace

import oracle
import pytest
import torch
from candidate_factory import make_candidates, random_candidates
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from hardkv_sglang.config import HardKVConfig
from hardkv_sglang.selection.importance import (
    SIMILARITY_TILE,
    Importance,
    joint_probabilities,
    key_redundancy,
    measure_importance,
    rkv_scores,
    snapkv_scores,
)
from hardkv_sglang.selection.top_p import Candidates, Lists

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}


def as_rows(tokens: dict[int, float], size: int) -> list[float]:
    return [tokens.get(j, 0.0) for j in range(size)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_joint_probabilities_equal_oracle(dtype, data):
    candidates = data.draw(random_candidates(dtype=dtype))
    mass, always = joint_probabilities(candidates)
    assert mass.dtype == dtype
    torch.testing.assert_close(mass.sum(-1) + always, torch.ones_like(always), rtol=0, atol=TOLERANCE[dtype])
    expected, expected_always = torch.zeros_like(mass), torch.ones_like(always)
    for b, lst in enumerate(oracle.lists_of(candidates)):
        for (g, i), (p, a) in lst.probabilities.items():
            expected[b, g, i] = torch.tensor(as_rows(p, lst.size), dtype=dtype)
            expected_always[b, g, i] = a
    torch.testing.assert_close(mass, expected, rtol=0, atol=TOLERANCE[dtype])
    torch.testing.assert_close(always, expected_always, rtol=0, atol=TOLERANCE[dtype])


def test_unattended_candidates_join_the_space():
    # attended: 1/4 of the query's mass; always kept: 3/4; a dropped token as heavy as all of it
    candidates = Candidates(
        logits2=torch.tensor([[[[-2.0, 0.0]]]]),
        lse2=torch.zeros(1, 1, 1),
        attended=torch.tensor([[True, False]]),
        valid=torch.ones(1, 2, dtype=torch.bool),
        query_valid=torch.ones(1, dtype=torch.bool),
    )
    mass, always = joint_probabilities(candidates)
    assert mass.flatten().tolist() == [0.125, 0.5]
    assert always.item() == 0.375


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("lse2", [-1e4, 0.0, 1e4])
def test_joint_probabilities_huge_logits_stay_finite(lse2, dtype):
    logits2 = torch.tensor([-1e4, -3.0, 0.0, 9998.0, 1e4, 1e4 - 1], dtype=dtype)
    attended = logits2 <= lse2
    candidates = Candidates(
        logits2=logits2[None, None, None],
        lse2=torch.full((1, 1, 1), lse2, dtype=dtype),
        attended=attended[None],
        valid=torch.ones(1, 6, dtype=torch.bool),
        query_valid=torch.ones(1, dtype=torch.bool),
    )
    mass, always = joint_probabilities(candidates)
    (p, a), *_ = oracle.lists_of(candidates)[0].probabilities.values()
    torch.testing.assert_close(mass.flatten(), torch.tensor(as_rows(p, 6), dtype=dtype))
    torch.testing.assert_close(always.flatten(), torch.tensor([a], dtype=dtype))


@settings(max_examples=25, deadline=None)
@given(candidates=random_candidates(), shift=st.sampled_from([-900.0, -1.5, 64.0]))
def test_joint_probabilities_shift_invariant(candidates, shift):
    shifted = replace(candidates, logits2=candidates.logits2 + shift, lse2=candidates.lse2 + shift)
    for a, b in zip(joint_probabilities(candidates), joint_probabilities(shifted), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("query_reduction", ["mean", "max", "union"])
@pytest.mark.parametrize("group_reduction", ["mean", "max"])
@settings(max_examples=12, deadline=None)
@given(candidates=random_candidates())
def test_measure_importance_equals_oracle(group_reduction, query_reduction, candidates):
    importance = measure_importance(candidates, group_reduction, query_reduction)
    for b, lst in enumerate(oracle.lists_of(candidates)):
        rows = oracle.distributions(lst, group_reduction, query_reduction)
        which = lst.queries if query_reduction == "union" else [0]
        for v, (mass, always) in zip(which, rows, strict=True):
            row = importance.distributions[b, v]
            torch.testing.assert_close(row.tolist(), as_rows(mass, lst.size), rtol=0, atol=1e-12)
            assert 1.0 - row.sum().item() == pytest.approx(always, abs=1e-12)
        mean = as_rows(oracle.mean_importance(lst), lst.size)
        torch.testing.assert_close(importance.mean[b].tolist(), mean, rtol=0, atol=1e-12)


@pytest.mark.parametrize("query_reduction", ["mean", "max", "union"])
def test_invalid_queries_change_nothing(query_reduction):
    few = make_candidates(seed=1, counts=[0, 9, 33], queries=3)
    garbage = torch.full((3, 2, 2, few.logits2.shape[-1]), math.nan, dtype=torch.float64)
    many = replace(
        few,
        logits2=torch.cat((garbage, few.logits2), 2),
        lse2=torch.cat((garbage[..., 0], few.lse2), 2),
        query_valid=torch.tensor([False, False, True, True, True]),
    )
    other = replace(many, logits2=torch.where(many.query_valid[:, None], many.logits2, 1e4))
    for reduction in ("mean", "max"):
        a, b, c = (measure_importance(x, reduction, query_reduction) for x in (few, many, other))
        assert torch.equal(b.mean, c.mean) and torch.equal(b.distributions, c.distributions)
        torch.testing.assert_close(a.mean, b.mean, rtol=0, atol=1e-15)
        own = b.distributions[:, 2:] if query_reduction == "union" else b.distributions
        torch.testing.assert_close(a.distributions, own, rtol=0, atol=1e-15)
        if query_reduction == "union":
            assert not b.distributions[:, :2].any()


def test_no_valid_query_measures_nothing():
    candidates = make_candidates(seed=1, counts=[5, 0], valid_queries=0)
    for group in ("mean", "max"):
        for query in ("mean", "max", "union"):
            importance = measure_importance(candidates, group, query)
            assert not importance.observed
            assert not importance.distributions.any() and not importance.mean.any()


@pytest.mark.parametrize("width", [1, 3, 7])
@settings(max_examples=15, deadline=None)
@given(candidates=random_candidates())
def test_snapkv_scores_equal_oracle(width, candidates):
    options = HardKVConfig(pooling_width=width)
    importance = measure_importance(candidates, "mean", "mean")
    scores = snapkv_scores(importance, candidates, options)
    for b, lst in enumerate(oracle.lists_of(candidates)):
        (mass, _), *_ = oracle.distributions(lst, "mean", "mean")
        expected = oracle.metric_scores(lst, mass, options, "snapkv")
        torch.testing.assert_close(scores[b, 0].tolist(), as_rows(expected, lst.size), rtol=0, atol=1e-12)
    if width == 1:
        assert torch.equal(scores, importance.distributions)


def test_snapkv_pooling_does_not_leak_into_padding():
    mass = torch.tensor([[[0.0, 0.0, 0.0, 0.7, 0.1]]])
    valid = torch.tensor([[False, False, False, True, True]])
    importance = Importance(mass, mass[:, 0], mass[:, 0].square(), torch.tensor(True))
    scores = snapkv_scores(importance, Lists(valid), HardKVConfig())
    assert scores.flatten().tolist() == pytest.approx([0, 0, 0, 0.7, 0.7])


@pytest.mark.parametrize("lam", [0.0, 0.07, 1.0])
@settings(max_examples=12, deadline=None)
@given(candidates=random_candidates())
def test_rkv_scores_equal_oracle(lam, candidates):
    options = HardKVConfig(rkv_lambda=lam, rkv_similarity=0.4)
    scores = rkv_scores(measure_importance(candidates, "mean", "mean"), candidates, options)
    for b, lst in enumerate(oracle.lists_of(candidates)):
        (mass, _), *_ = oracle.distributions(lst, "mean", "mean")
        expected = oracle.metric_scores(lst, mass, options, "rkv")
        torch.testing.assert_close(scores[b, 0].tolist(), as_rows(expected, lst.size), rtol=0, atol=1e-10)


def test_rkv_without_keys_is_refused():
    candidates = replace(make_candidates(seed=1, counts=[3]), keys=None)
    with pytest.raises(ValueError, match="keys"):
        rkv_scores(measure_importance(candidates, "mean", "mean"), candidates, HardKVConfig())


T = SIMILARITY_TILE


@pytest.mark.parametrize("size", [0, 1, 2, T - 1, T, T + 1, 2 * T + 1])
@pytest.mark.parametrize("similarity", [0.0, 0.5, 0.9])
def test_key_redundancy_equals_oracle(size, similarity):
    g = torch.Generator().manual_seed(size)
    keys = torch.randn(1, size + 3, 3, generator=g, dtype=torch.float64)
    valid = torch.arange(size + 3)[None] >= 3
    keys[0, :3] = math.nan
    tokens = list(range(3, size + 3))
    expected = oracle.key_redundancy({j: keys[0, j].tolist() for j in tokens}, tokens, similarity)
    actual = key_redundancy(keys, valid, similarity)
    torch.testing.assert_close(actual[0].tolist(), as_rows(expected, size + 3), rtol=0, atol=1e-12)


def test_newest_of_similar_keys_is_not_redundant():
    # three equal keys and one at a right angle: only the newest repeat is forgiven, by the two others
    keys = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [2.0, 0.0]]])
    redundancy = key_redundancy(keys, torch.ones(1, 4, dtype=torch.bool), 0.5)[0]
    column_means = torch.tensor([2 / 4, 1 / 4, 0.0, 0.0])  # row 3 forgives column 1
    torch.testing.assert_close(redundancy, column_means.softmax(0))


class LargestTensor(TorchFunctionMode):
    """Records the largest number of elements that any operation returns."""

    largest = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


def test_key_redundancy_memory_is_linear():
    keys = torch.randn(2, 700, 16)
    with LargestTensor() as memory:
        key_redundancy(keys, torch.ones(2, 700, dtype=torch.bool), 0.5)
    assert 2 * 700 <= memory.largest <= 2 * 700 * SIMILARITY_TILE
