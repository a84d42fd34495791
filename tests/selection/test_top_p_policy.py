"""The Top-p policy: its sets against the oracle, the mass that it keeps, floor and cap, temperatures."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import oracle
import pytest
import torch
from candidate_factory import TOP_P, make_candidates, random_candidates
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_variants import ATTENTION, FREE, PER_HEAD, as_sets, equal, policy_of, select

from hardkv_sglang.config import HardKVConfig
from hardkv_sglang.selection.policies import make_policy

REDUCTIONS = list(product(["mean", "max"], ["mean", "max", "union"]))


@pytest.mark.parametrize("metric", ["attention", "snapkv", "rkv"])
@pytest.mark.parametrize(("group", "query"), REDUCTIONS, ids=lambda x: x)
@settings(max_examples=8, deadline=None)
@given(data=st.data(), top_p=st.sampled_from(TOP_P), guarantee=st.sampled_from(["none", "raw"]))
def test_hardkv_equals_oracle(metric, group, query, data, top_p, guarantee):
    candidates = data.draw(random_candidates())
    options = HardKVConfig(
        metric=metric, budget="per_head", group_reduction=group, query_reduction=query, top_p=top_p,
        guarantee=guarantee,
        min_tokens=data.draw(st.sampled_from([0, 5])), max_tokens=data.draw(st.sampled_from([None, 32])),
    )  # fmt: skip
    result = make_policy(options, 1).select(candidates)
    keep = as_sets(result.keep)
    for b, lst in enumerate(oracle.lists_of(candidates)):
        temperature = result.temperature[b].item() or 1.0
        expected = oracle.select(lst, options, temperature)
        if metric != "attention":
            # the calibrated mass sits on p itself, so the last token of a set may be decided by rounding
            nearby = [oracle.select(lst, options, temperature * (1 + e)).keep for e in (-1e-5, 1e-5)]
            assert keep[b] in [expected.keep, *nearby]
        else:
            assert keep[b] == expected.keep
            assert result.kept_mass[b].item() == pytest.approx(expected.kept_mass, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("query", ["mean", "union"])
@settings(max_examples=30, deadline=None)
@given(data=st.data(), top_p=st.floats(0.05, 0.999))
def test_attention_without_cap_keeps_mass_p(query, dtype, data, top_p):
    candidates = data.draw(random_candidates(dtype=dtype))
    result = select(candidates, query_reduction=query, top_p=top_p, **ATTENTION)
    assert (result.kept_mass >= top_p - 1e-6).all()


@pytest.mark.parametrize("query", ["mean", "max", "union"])
@pytest.mark.parametrize("metric", ["attention", "snapkv", "rkv"])
@settings(max_examples=10, deadline=None)
@given(data=st.data(), top_p=st.sampled_from(TOP_P))
def test_guarantee_raw_keeps_mass_p_for_every_metric(metric, query, data, top_p):
    candidates = data.draw(random_candidates())
    options = {"metric": metric, "query_reduction": query, "group_reduction": "max", "top_p": top_p, **FREE}
    result = select(candidates, **options, guarantee="raw")
    assert (result.kept_mass >= top_p - 1e-6).all()
    assert not (select(candidates, **options).keep & ~result.keep).any()


def test_other_metrics_do_not_keep_mass_p_by_themselves():
    candidates = make_candidates(seed=2, counts=[64] * 8, spread=4.0)
    result = select(candidates, metric="snapkv", top_p=0.9, **FREE)
    assert (result.kept_mass < 0.9).any()


@pytest.mark.parametrize("query", ["mean", "max", "union"])
@settings(max_examples=20, deadline=None)
@given(candidates=random_candidates(), low=st.floats(0.05, 1.0), high=st.floats(0.05, 1.0))
def test_kept_sets_grow_with_p(query, candidates, low, high):
    small, large = (select(candidates, query_reduction=query, top_p=p, **ATTENTION).keep for p in sorted((low, high)))
    assert not (small & ~large).any()


@settings(max_examples=20, deadline=None)
@given(candidates=random_candidates(), low=st.sampled_from(TOP_P[:2]), high=st.sampled_from(TOP_P[2:]))
def test_kept_sets_grow_with_p_at_one_temperature(candidates, low, high):
    temperature = torch.full((candidates.valid.shape[0],), 0.7)
    small, large = (select(candidates, temperature, metric="snapkv", top_p=p, **FREE).keep for p in (low, high))
    assert not (small & ~large).any()


@settings(max_examples=30, deadline=None)
@given(candidates=random_candidates(), top_p=st.sampled_from(TOP_P))
def test_union_keeps_at_least_as_much_as_mean(candidates, top_p):
    mean = select(candidates, query_reduction="mean", top_p=top_p, **ATTENTION)
    union = select(candidates, query_reduction="union", top_p=top_p, **ATTENTION)
    assert (union.keep.sum(-1) >= mean.keep.sum(-1)).all()


@pytest.mark.parametrize("metric", ["attention", "snapkv", "rkv"])
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_p_one_keeps_everything(metric, data):
    candidates = data.draw(random_candidates(dtype=torch.float32))
    assert torch.equal(select(candidates, metric=metric, top_p=1.0, max_tokens=None).keep, candidates.valid)


def test_p_one_keeps_tokens_without_mass():
    candidates = make_candidates(seed=1, counts=[40], spread=1.0, always=400.0, dtype=torch.float32)
    assert torch.equal(select(candidates, top_p=1.0).keep, candidates.valid)
    assert not select(candidates, top_p=0.999, **FREE).keep.any()


@pytest.mark.parametrize("metric", ["attention", "snapkv", "rkv"])
def test_without_valid_query_everything_stays_up_to_the_cap(metric):
    candidates = make_candidates(seed=1, counts=[40, 0, 33], valid_queries=0)
    result = select(candidates, metric=metric, max_tokens=None)
    assert torch.equal(result.keep, candidates.valid)
    assert result.kept_mass.tolist() == [1.0, 1.0, 1.0]
    assert select(candidates, metric=metric, max_tokens=32).keep.sum(-1).tolist() == [32, 0, 32]


@pytest.mark.parametrize("metric", ["attention", "snapkv", "rkv"])
@settings(max_examples=10, deadline=None)
@given(data=st.data(), floor=st.sampled_from([0, 1, 31, 32]), cap=st.sampled_from([32, 33, None]))
def test_floor_and_cap(metric, data, floor, cap):
    candidates = data.draw(random_candidates())
    options = {"metric": metric, "top_p": 0.9001}
    free = select(candidates, **options, **FREE).keep
    keep = select(candidates, **options, min_tokens=floor, max_tokens=cap).keep
    size = candidates.valid.sum(-1)
    expected = torch.minimum(free.sum(-1).clamp(min=floor, max=cap), size)
    assert torch.equal(keep.sum(-1), expected)
    raised, lowered = expected >= free.sum(-1), expected <= free.sum(-1)
    assert not (free & ~keep)[raised].any() and not (keep & ~free)[lowered].any()


@settings(max_examples=20, deadline=None)
@given(
    candidates=random_candidates(),
    shift=st.sampled_from([-300.0, 12.25]),
    metric=st.sampled_from(["attention", "snapkv"]),
)
def test_selection_is_shift_invariant(candidates, shift, metric):
    shifted = replace(candidates, logits2=candidates.logits2 + shift, lse2=candidates.lse2 + shift)
    a, b = (select(c, metric=metric, calibration="none", top_p=0.9001) for c in (candidates, shifted))
    assert torch.equal(a.keep, b.keep)


@settings(max_examples=20, deadline=None)
@given(candidates=random_candidates(), seed=st.integers(0, 1 << 20), query=st.sampled_from(["mean", "union"]))
def test_attention_is_permutation_equivariant(candidates, seed, query):
    order = torch.randperm(candidates.valid.shape[-1], generator=torch.Generator().manual_seed(seed))
    moved = replace(
        candidates, logits2=candidates.logits2[..., order],
        attended=candidates.attended[:, order], valid=candidates.valid[:, order],
    )  # fmt: skip
    a, b = (select(c, query_reduction=query, top_p=0.9001, **ATTENTION) for c in (candidates, moved))
    assert torch.equal(a.keep[:, order], b.keep)


@pytest.mark.parametrize("query", ["mean", "union"])
@pytest.mark.parametrize("metric", ["snapkv", "rkv"])
def test_a_reused_temperature_gives_the_same_selection(metric, query):
    candidates = make_candidates(seed=29, counts=[40, 64, 33, 0], dtype=torch.float32)
    policy = policy_of(metric=metric, query_reduction=query, **FREE)
    first = policy.select(candidates, None)
    assert torch.equal(policy.select(candidates, first.temperature).keep, first.keep)
    zeros = policy.select(candidates, torch.zeros(4))
    assert equal(first, zeros)


def test_only_uncalibrated_lists_are_calibrated():
    candidates = make_candidates(seed=29, counts=[40, 64, 33])
    policy = policy_of(metric="snapkv", **FREE)
    fresh = policy.select(candidates, None).temperature
    mixed = policy.select(candidates, torch.tensor([0.0, 9.0, 0.0])).temperature
    assert mixed.tolist() == [fresh[0].item(), 9.0, fresh[2].item()]


def test_infeasible_lists_are_flagged_until_they_reuse():
    # one token takes all: pooling repeats its score seven times, so its Top-p count of 1 is out of reach
    candidates = make_candidates(seed=31, counts=[20], group=1, queries=1, always=-30.0, padding=0)
    candidates.logits2.fill_(-40.0)
    candidates.logits2[..., 10] = 0.0
    candidates.attended.fill_(True)
    candidates.lse2.zero_()
    policy = policy_of(metric="snapkv", **FREE)
    first = policy.select(candidates)
    assert first.infeasible.tolist() == [True]
    assert as_sets(first.keep) == [set(range(7, 14))]
    assert policy.select(candidates, first.temperature).infeasible.tolist() == [False]


@pytest.mark.parametrize(("metric", "prior_weight"), [("attention", 0.0), ("output", 0.0), ("output", 0.1)])
@settings(max_examples=30, deadline=None)
@given(data=st.data(), top_p=st.sampled_from(TOP_P))
def test_shared_budget_is_the_smallest_set_of_all_lists(metric, prior_weight, data, top_p):
    # a single candidate is at no distance from the mean of the candidates: its energy is a rounding error
    candidates = data.draw(random_candidates(min_count=2))
    lists = oracle.lists_of(candidates)
    weights = [
        oracle.mean_importance(lst) if metric == "attention" else oracle.expected_energy(lst, prior_weight)
        for lst in lists
    ]
    total = len(lists) if metric == "attention" else sum(sum(w.values()) for w in weights)
    ranked = sorted((w, b, j) for b, row in enumerate(weights) for j, w in row.items())
    allowed, keep = (1 - top_p) * total, [set(row) for row in weights]
    for weight, b, j in ranked:
        allowed -= weight
        if allowed < 0:
            break
        keep[b].discard(j)
    options = {"metric": metric, "budget": "shared", "top_p": top_p, "prior_weight": prior_weight, **FREE}
    kept = as_sets(select(candidates, **options).keep)
    # two candidates are equally far from their mean, weight against weight: rounding may swap what is equal
    ours, theirs = (
        sorted(weights[b][j] for b, (one, other) in enumerate(pair) for j in one - other)
        for pair in (list(zip(kept, keep, strict=True)), list(zip(keep, kept, strict=True)))
    )
    assert ours == pytest.approx(theirs, rel=1e-9)


@settings(max_examples=20, deadline=None)
@given(candidates=random_candidates(), low=st.floats(0.05, 1.0), high=st.floats(0.05, 1.0))
def test_shared_sets_grow_with_p(candidates, low, high):
    options = {"metric": "output", "budget": "shared", **FREE}
    small, large = (select(candidates, top_p=p, **options).keep for p in sorted((low, high)))
    assert not (small & ~large).any()


def test_shared_budget_follows_the_lists():
    """Swapping lists swaps what they keep; a head whose values are all alike keeps nothing."""
    candidates = make_candidates(seed=47, counts=[40, 40, 40])
    alike = candidates.values.clone()
    alike[1] = torch.where(candidates.valid[1, :, None], 2.0, math.nan)
    candidates = replace(candidates, values=alike)
    keep = select(candidates, metric="output", budget="shared", top_p=0.9001, **FREE).keep
    assert keep[0].any() and keep[2].any() and not keep[1].any()
    order = torch.tensor([2, 1, 0])
    tensors = {name: getattr(candidates, name)[order] for name in ("logits2", "lse2", "attended", "valid", "values")}
    swapped = replace(candidates, **tensors)
    assert torch.equal(select(swapped, metric="output", budget="shared", top_p=0.9001, **FREE).keep, keep[order])


@pytest.mark.parametrize("budget", ["per_head", "shared"])
@pytest.mark.parametrize("cap", [32, 40, None])
def test_lists_fill_their_last_head_page(budget, cap):
    candidates = make_candidates(seed=53, counts=[0, 1, 7, 8, 33, 64, 70])
    options = {**PER_HEAD, "budget": budget, "top_p": 0.5003, "min_tokens": 3, "max_tokens": None}
    bare = make_policy(HardKVConfig(**options), 1).select(candidates).keep
    filled = make_policy(HardKVConfig(**{**options, "max_tokens": cap}), 8).select(candidates).keep
    most = candidates.valid.sum(-1).clamp(max=cap or 1000)
    assert torch.equal(filled.sum(-1), torch.minimum(-(-bare.sum(-1) // 8) * 8, most))
    uncut = bare.sum(-1) <= most
    assert not (bare & ~filled)[uncut].any()
