from __future__ import annotations

import math

import oracle
import pytest
import torch
from candidate_factory import TOP_P, make_candidates, random_candidates
from hypothesis import given, settings
from hypothesis import strategies as st

from hardkv_sglang.config import HardKVConfig
from hardkv_sglang.selection.calibration import (
    TOLERANCE,
    Calibration,
    calibrate,
    calibrated_mass,
    log2_scores,
    prior_temperature,
    reuse,
    uncalibrated,
)
from hardkv_sglang.selection.importance import METRICS, measure_importance
from hardkv_sglang.selection.top_p import (
    Candidates,
    ascending_order,
    last_in_order,
    top_p_counts,
)

LIMIT = 64.0


def problem(
    candidates: Candidates, metric: str, top_p: float, query_reduction: str = "mean"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logits2, mass, target) of a calibration, as the hardkv policy poses it."""
    importance = measure_importance(candidates, "mean", query_reduction)
    scores = METRICS[metric].score(importance, candidates, HardKVConfig())
    valid = candidates.valid[:, None]
    counts = top_p_counts(importance.distributions, ascending_order(importance.distributions, valid), top_p)
    target = last_in_order(ascending_order(scores, valid), counts)
    return log2_scores(scores, candidates.valid), importance.distributions.sum(-1), target


def joined_mass(logits2, mass, target, temperature):
    """Mean of A + mass * M(T) over the distributions with a target, [B]; NaN where there is none."""
    spread = calibrated_mass(logits2, mass, temperature)
    reached = 1.0 - mass + torch.where(target, spread, 0.0).sum(-1)
    active = target.any(-1)
    return (reached * active).sum(-1) / active.sum(-1)


@pytest.mark.parametrize("metric", ["attention", "snapkv", "rkv"])
@settings(max_examples=20, deadline=None)
@given(candidates=random_candidates(), top_p=st.sampled_from(TOP_P))
def test_mass_of_the_target_never_rises_with_temperature(metric, candidates, top_p):
    posed = problem(candidates, metric, top_p)
    temperatures = torch.linspace(-6, 6, 25).exp2()
    curve = torch.stack([joined_mass(*posed, t.expand(posed[1].shape[0])) for t in temperatures])
    assert not (curve.diff(dim=0) > 1e-12).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("query_reduction", ["mean", "union"])
@pytest.mark.parametrize("metric", ["attention", "snapkv", "rkv"])
@settings(max_examples=15, deadline=None)
@given(data=st.data(), top_p=st.sampled_from(TOP_P))
def test_calibrated_mass_reaches_p_or_is_flagged(metric, query_reduction, dtype, data, top_p):
    candidates = data.draw(random_candidates(dtype=dtype))
    posed = problem(candidates, metric, top_p, query_reduction)
    result = calibrate(*posed, top_p, LIMIT)
    needed = posed[2].any(-1).any(-1)
    assert torch.equal(result.temperature > 0, needed)
    surplus = joined_mass(*posed, result.temperature) - top_p
    slack = 1e-6  # of comparing a float sum here with a fixed-point sum there
    feasible = surplus[needed & ~result.infeasible]
    assert ((feasible >= -slack) & (feasible <= TOLERANCE + slack)).all()
    flagged = surplus[result.infeasible]
    assert ((flagged < slack) | (flagged > TOLERANCE - slack)).all()
    within = (result.temperature >= 1 / LIMIT) & (result.temperature <= LIMIT)
    assert (within | ~needed).all()


@pytest.mark.parametrize("query_reduction", ["mean", "union"])
@pytest.mark.parametrize("metric", ["snapkv", "rkv"])
@settings(max_examples=10, deadline=None)
@given(candidates=random_candidates(), top_p=st.sampled_from(TOP_P))
def test_temperature_equals_oracle(metric, query_reduction, candidates, top_p):
    posed = problem(candidates, metric, top_p, query_reduction)
    result = calibrate(*posed, top_p, LIMIT)
    options = HardKVConfig()
    for b, lst in enumerate(oracle.lists_of(candidates)):
        rows = oracle.distributions(lst, "mean", query_reduction)
        scores = [oracle.metric_scores(lst, mass, options, metric) for mass, _ in rows]
        expected = oracle.bisect_temperature(rows, scores, top_p, LIMIT)
        if expected is None:
            assert result.temperature[b] == 0 and not result.infeasible[b]
            continue
        reached = oracle.calibrated_mass_of_target(rows, scores, top_p, result.temperature[b].item())
        best = oracle.calibrated_mass_of_target(rows, scores, top_p, expected)
        # masses, not temperatures: where the curve is flat many temperatures are as good
        assert reached == pytest.approx(best, abs=1e-5)
        assert bool(result.infeasible[b]) == (not 0 <= best - top_p <= TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("metric", ["snapkv", "rkv"])
@settings(max_examples=30, deadline=None)
@given(data=st.data(), top_p=st.sampled_from(TOP_P))
def test_top_p_at_the_calibrated_temperature_chooses_the_raw_count(metric, dtype, data, top_p):
    candidates = data.draw(random_candidates(dtype=dtype))
    logits2, mass, target = problem(candidates, metric, top_p)
    result = calibrate(logits2, mass, target, top_p, LIMIT)
    spread = calibrated_mass(logits2, mass, result.temperature)
    counts = top_p_counts(spread, spread.argsort(-1), top_p)[:, 0]
    wanted = target.sum(-1)[:, 0]
    feasible = ~result.infeasible
    assert (counts[feasible] <= wanted[feasible]).all()
    # a token is missing only if all that are missing weigh next to nothing
    missing = torch.where(target[:, 0], spread[:, 0], 2.0).sort(-1).values.cumsum(-1)
    number = (wanted - counts).clamp(min=0, max=missing.shape[-1])
    light = torch.cat((torch.zeros_like(missing[:, :1]), missing), -1).gather(-1, number[:, None])[:, 0]
    assert (light[feasible] < 2e-3).all()


def test_peaked_pooled_list_is_infeasible():
    # one token holds everything, pooling hands its score to seven: the best of them carries 1/7 at most
    logits2 = torch.full((1, 1, 20), -30.0)
    logits2[..., 6:13] = 0.0
    target = torch.zeros(1, 1, 20, dtype=torch.bool)
    target[..., 12] = True
    result = calibrate(logits2, torch.ones(1, 1), target, 0.9, LIMIT)
    assert result.infeasible.tolist() == [True]
    assert result.temperature.tolist() == [1 / LIMIT]
    spread = calibrated_mass(logits2, torch.ones(1, 1), result.temperature)
    assert spread[0, 0, 12].item() == pytest.approx(1 / 7)


def test_two_token_temperature_in_closed_form():
    # share of the better of two tokens: 1 / (1 + 2 ** (-gap / T)) = 3/4 at T = gap / log2(3)
    logits2 = torch.tensor([[[-5.0, 0.0]]], dtype=torch.float64)
    target = torch.tensor([[[False, True]]])
    result = calibrate(logits2, torch.ones(1, 1, dtype=torch.float64), target, 0.75, LIMIT)
    assert result.temperature.item() == pytest.approx(5.0 / math.log2(3), rel=1e-6)
    # with half of the mass always kept the target needs (0.75 - 0.5) / 0.5 = 1/2: as flat as may be
    half = calibrate(logits2, torch.full((1, 1), 0.5, dtype=torch.float64), target, 0.75, LIMIT)
    assert half.temperature.item() > 0.99 * LIMIT and half.infeasible.item()


def test_limit_one_means_no_calibration():
    posed = problem(make_candidates(seed=3, counts=[33, 8]), "snapkv", 0.9001)
    assert calibrate(*posed, 0.9001, 1.0).temperature.tolist() == [1.0, 1.0]


@settings(max_examples=15, deadline=None)
@given(candidates=random_candidates(min_count=1), factor=st.sampled_from([0.01, 0.5]))
def test_scale_of_the_scores_does_not_matter(candidates, factor):
    logits2, mass, target = problem(candidates, "snapkv", 0.9001)
    a = calibrate(logits2, mass, target, 0.9001, LIMIT)
    b = calibrate(logits2 + math.log2(factor), mass, target, 0.9001, LIMIT)
    at_a = joined_mass(logits2, mass, target, a.temperature)
    torch.testing.assert_close(joined_mass(logits2, mass, target, b.temperature), at_a, equal_nan=True)


@settings(max_examples=15, deadline=None)
@given(candidates=random_candidates(), top_p=st.sampled_from(TOP_P))
def test_lists_are_calibrated_on_their_own(candidates, top_p):
    posed = problem(candidates, "snapkv", top_p)
    together = calibrate(*posed, top_p, LIMIT)
    for b in range(candidates.valid.shape[0]):
        alone = calibrate(*(x[b : b + 1] for x in posed), top_p, LIMIT)
        assert torch.equal(alone.temperature, together.temperature[b : b + 1])
        assert torch.equal(alone.infeasible, together.infeasible[b : b + 1])


def test_lists_of_one_event_get_different_temperatures():
    # the reference shares layer 0's temperature with every layer
    posed = problem(make_candidates(seed=5, counts=[40, 40, 40], spread=4.0), "snapkv", 0.9001)
    assert calibrate(*posed, 0.9001, LIMIT).temperature.unique().numel() == 3


def test_reuse_keeps_known_temperatures():
    fresh = Calibration(torch.tensor([2.0, 3.0, 0.0]), torch.tensor([True, True, False]))
    kept = reuse(fresh, torch.tensor([0.5, 0.0, 0.0]))
    assert kept.temperature.tolist() == [0.5, 3.0, 0.0]
    assert kept.infeasible.tolist() == [False, True, False]
    assert reuse(fresh, None) is fresh


def test_prior_is_the_geometric_mean_of_solved_events():
    temperatures = torch.tensor([[0.5, 64.0, 0.0], [8.0, 2.0, 0.0]])
    infeasible = torch.tensor([[False, True, False], [False, False, False]])
    torch.testing.assert_close(prior_temperature(temperatures, infeasible), torch.tensor([2.0, 2.0, 0.0]))


def test_calibrated_mass_of_empty_and_zero_lists():
    valid = torch.tensor([[False, False], [True, True]])
    logits2 = log2_scores(torch.zeros(2, 1, 2), valid)
    spread = calibrated_mass(logits2, torch.tensor([[0.0], [0.5]]), torch.tensor([1.0, 0.0]))
    assert spread.tolist() == [[[0.0, 0.0]], [[0.25, 0.25]]]
    assert uncalibrated(valid).temperature.tolist() == [1.0, 1.0]
