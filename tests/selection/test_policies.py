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
from torch.overrides import TorchFunctionMode

from hardkv_sglang.config import HardKVConfig
from hardkv_sglang.selection import top_p as top_p_module
from hardkv_sglang.selection.policies import POLICIES, make_policy
from hardkv_sglang.selection.policies.base import Policy
from hardkv_sglang.selection.top_p import Candidates, Selection

PER_HEAD = {"metric": "attention", "budget": "per_head", "top_p": 0.95}
"""What the tests start from, whatever is shipped."""
FREE = {"min_tokens": 0, "max_tokens": None}
"""No floor and no cap."""
ATTENTION = {"metric": "attention", **FREE}
VARIANTS = [
    {},
    {"metric": "output"},
    {"metric": "output", "budget": "shared"},
    {"metric": "snapkv", "budget": "shared"},
    {"budget": "shared"},
    {"query_reduction": "union"},
    {"group_reduction": "max", "query_reduction": "max"},
    {"metric": "snapkv"},
    {"metric": "snapkv", "calibration": "none"},
    {"metric": "snapkv", "query_reduction": "union", "guarantee": "raw"},
    {"metric": "rkv"},
    {"metric": "rkv", "query_reduction": "union"},
    {"budget": "uniform", "uniform_tokens": 33},
    {"policy": "snapkv", "uniform_tokens": 32},
    {"policy": "rkv", "uniform_tokens": 31},
    {"policy": "streaming"},
]
"""Every policy, metric and reduction at least once."""


def ids(options: dict) -> str:
    return "-".join(f"{value}" for value in options.values()) or "default"


def policy_of(**options) -> Policy:
    return make_policy(HardKVConfig(**{**PER_HEAD, **options}), 1)


def select(candidates: Candidates, temperature: torch.Tensor | None = None, **options) -> Selection:
    return policy_of(**options).select(candidates, temperature)


def as_sets(mask: torch.Tensor) -> list[set[int]]:
    return [{j for j, kept in enumerate(row) if kept} for row in mask.tolist()]


def equal(a: Selection, b: Selection) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("keep", "temperature", "infeasible"))


@pytest.mark.parametrize("options", VARIANTS, ids=ids)
@pytest.mark.parametrize("most", [1, 150])
def test_long_events_are_chosen_in_parts(options: dict, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is sorted together, the choice is the same to the bit; temperatures of earlier events included."""
    candidates = make_candidates(3, [60, 41, 0, 57, 33], dtype=torch.float32)
    options, known = {"min_tokens": 4, "max_tokens": 48, **options}, torch.tensor([0.5, 0.0, 1.5, 2.0, 0.0])
    known = None if options.get("policy") else known
    want = select(candidates, known, **options)
    monkeypatch.setattr(top_p_module, "MAX_SORTED", most)
    assert equal(select(candidates, known, **options), want)


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


@pytest.mark.parametrize("options", VARIANTS, ids=ids)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_every_policy_on_awkward_lists(options, dtype):
    counts = [0, 1, 31, 32, 33, 64, 70]
    candidates = make_candidates(seed=7, counts=counts, dtype=dtype)
    result = select(candidates, **options, max_tokens=64)
    assert not (result.keep & ~candidates.valid).any()
    assert result.keep.dtype == result.infeasible.dtype == torch.bool
    assert result.temperature.dtype == result.kept_mass.dtype == torch.float32
    assert result.temperature.isfinite().all()
    assert ((result.kept_mass >= -1e-5) & (result.kept_mass <= 1 + 1e-5)).all()
    assert (result.keep.sum(-1) <= 64).all()
    assert result.kept_mass[0] == 1.0
    if options.get("policy", "hardkv") == "hardkv" and options.get("budget") != "uniform":
        assert (result.keep.sum(-1) >= torch.tensor(counts).clamp(max=32)).all()


@pytest.mark.parametrize("options", VARIANTS, ids=ids)
def test_event_without_candidate_slots(options):
    result = select(make_candidates(seed=7, counts=[0, 0], padding=0), **options)
    assert result.keep.shape == (2, 0)
    assert result.kept_mass.tolist() == [1.0, 1.0]
    assert not result.infeasible.any()


@pytest.mark.parametrize("options", [o for o in VARIANTS if o.get("budget") != "shared"], ids=ids)
def test_lists_never_influence_each_other(options):
    candidates = make_candidates(seed=11, counts=[40, 0, 33, 12], dtype=torch.float32)
    together = select(candidates, **options)
    for b in range(4):
        part = slice(b, b + 1)
        alone = replace(
            candidates, logits2=candidates.logits2[part], lse2=candidates.lse2[part],
            attended=candidates.attended[part], valid=candidates.valid[part], keys=candidates.keys[part],
            values=candidates.values[part],
        )  # fmt: skip
        result = select(alone, **options)
        assert torch.equal(result.keep, together.keep[part])
        assert torch.equal(result.temperature, together.temperature[part])


@pytest.mark.parametrize("options", VARIANTS, ids=ids)
def test_what_is_not_valid_changes_nothing(options):
    candidates = make_candidates(seed=13, counts=[40, 5], queries=4, valid_queries=2, dtype=torch.float32)
    live = candidates.valid[:, None, None] & candidates.query_valid[:, None]
    cleaned = replace(
        candidates,
        logits2=torch.where(live, candidates.logits2, 1e4),
        lse2=torch.where(candidates.query_valid, candidates.lse2, -1e4),
        attended=candidates.attended & candidates.valid,
        keys=torch.where(candidates.valid[..., None], candidates.keys, 1.0),
        values=torch.where(candidates.valid[..., None], candidates.values, 1.0),
    )
    assert equal(select(candidates, **options), select(cleaned, **options))


@pytest.mark.parametrize("options", VARIANTS, ids=ids)
def test_requests_share_nothing(options):
    one, other = (make_candidates(seed=s, counts=[40, 33], dtype=torch.float32) for s in (1, 2))
    policy = policy_of(**options)
    before = policy.select(other)
    policy.select(one)
    assert equal(policy.select(other), before)


@pytest.mark.parametrize("options", VARIANTS, ids=ids)
def test_selection_is_deterministic(options):
    first, second = (
        select(make_candidates(seed=17, counts=[64, 3, 50], dtype=torch.float32), **options) for _ in range(2)
    )
    assert equal(first, second)


SYNCING = {
    "item", "tolist", "cpu", "numpy", "nonzero", "argwhere", "masked_select", "unique", "unique_consecutive",
    "repeat_interleave", "__bool__", "__int__", "__float__", "__index__", "__contains__", "equal", "allclose",
}  # fmt: skip


def is_bool_index(index: object) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in parts)


class ForbidSync(TorchFunctionMode):
    """Fails on operations that wait for the device: those whose result shape or value the host needs."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        assert name not in SYNCING, f"{name} synchronises"
        assert name != "where" or len(args) + len(kwargs or {}) == 3, "where(condition) synchronises"
        if name in ("__getitem__", "__setitem__"):
            assert not is_bool_index(args[1]), "boolean indexing synchronises"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [*VARIANTS, {"top_p": 1.0}], ids=ids)
def test_select_never_waits_for_the_device(options):
    candidates = make_candidates(seed=19, counts=[40, 5], dtype=torch.float32)
    with ForbidSync():
        select(candidates, torch.tensor([0.0, 1.5]), **options)


@pytest.mark.parametrize(
    "sync",
    [
        lambda x: x[x > 0],
        lambda x: x.sum().item(),
        lambda x: x.nonzero(),
        lambda x: torch.where(x > 0),
        lambda x: bool(x.any()),
        lambda x: int(x.sum()),
        lambda x: x.__setitem__(x > 0, 1.0),
    ],
    ids=["getitem", "item", "nonzero", "where", "bool", "int", "setitem"],
)
def test_forbid_sync_can_fail(sync):
    with ForbidSync(), pytest.raises(AssertionError, match="synchronises"):
        sync(torch.ones(3))


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


def test_invalid_candidates_never_score():
    # a key that a query cannot see (future, or gone) is not valid: however well it fits, it takes no mass
    candidates = make_candidates(seed=23, counts=[20], padding=1)
    loud = replace(candidates, logits2=torch.where(candidates.valid[:, None, None], candidates.logits2, 1e4))
    assert equal(select(candidates), select(loud))
    with pytest.raises(ValueError, match="recent_tokens"):
        HardKVConfig(recent_tokens=32, query_window=33)


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


@pytest.mark.parametrize(
    ("options", "metric"),
    [({"policy": "snapkv"}, "snapkv"), ({"policy": "rkv"}, "rkv"), ({"budget": "uniform"}, "attention")],
    ids=["snapkv", "rkv", "attention"],
)
@settings(max_examples=10, deadline=None)
@given(data=st.data(), budget=st.sampled_from([1, 31, 32, 33, 4096]))
def test_uniform_budgets_equal_oracle(options, metric, data, budget):
    candidates = data.draw(random_candidates())
    result = select(candidates, **options, uniform_tokens=budget)
    defaults = HardKVConfig()
    for b, lst in enumerate(oracle.lists_of(candidates)):
        (mass, _), *_ = oracle.distributions(lst, "mean", "mean")
        best = oracle.best_first(oracle.metric_scores(lst, mass, defaults, metric))
        assert as_sets(result.keep)[b] == set(best[:budget])


def test_uniform_budget_without_query_keeps_the_newest():
    candidates = make_candidates(seed=37, counts=[40, 3], valid_queries=0)
    keep = as_sets(select(candidates, policy="snapkv", uniform_tokens=10).keep)
    assert keep == [set(range(32, 42)), {39, 40, 41}]


def test_fixed_budget_above_the_cap_is_refused():
    for options in ({"policy": "snapkv"}, {"policy": "rkv"}, {"budget": "uniform"}):
        with pytest.raises(ValueError, match="uniform_tokens"):
            HardKVConfig(**options, uniform_tokens=65, max_tokens=64)
    with pytest.raises(ValueError, match="sink_tokens"):
        HardKVConfig(policy="streaming", sink_tokens=65, max_tokens=64)
    HardKVConfig(policy="streaming", sink_tokens=65, max_tokens=None)
    HardKVConfig(uniform_tokens=65, sink_tokens=65, max_tokens=64)


@pytest.mark.parametrize("sinks", [0, 1, 4, 100])
def test_streaming_keeps_the_oldest_whatever_they_score(sinks):
    counts = [0, 1, 33]
    candidates = make_candidates(seed=41, counts=counts)
    result = select(candidates, policy="streaming", sink_tokens=sinks)
    size = candidates.valid.shape[-1]
    assert as_sets(result.keep) == [set(range(size - n, size - n + min(n, sinks))) for n in counts]
    assert torch.equal(result.kept_mass, select(candidates, policy="streaming", sink_tokens=sinks).kept_mass)


def test_only_rkv_reads_keys_and_only_output_reads_values():
    needing = [o for o in VARIANTS if policy_of(**o).needs_keys]
    assert needing == [o for o in VARIANTS if "rkv" in (o.get("metric"), o.get("policy"))]
    reading = [o for o in VARIANTS if policy_of(**o).needs_values]
    assert reading == [o for o in VARIANTS if o.get("metric") == "output"]
    candidates = replace(make_candidates(seed=43, counts=[5]), keys=None, values=None)
    for options in VARIANTS:
        if options not in needing + reading:
            select(candidates, **options)


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


def test_every_configured_policy_exists():
    field = HardKVConfig.__dataclass_fields__["policy"]
    assert set(field.metadata["choices"]) == set(POLICIES)
