"""What holds for every policy, and the uniform ones."""

from __future__ import annotations

from dataclasses import replace

import oracle
import pytest
import torch
from candidate_factory import make_candidates, random_candidates
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_variants import VARIANTS, as_sets, equal, ids, policy_of, select
from torch.overrides import TorchFunctionMode

from hardkv_sglang.config import HardKVConfig
from hardkv_sglang.selection import top_p as top_p_module
from hardkv_sglang.selection.policies import POLICIES


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


def test_invalid_candidates_never_score():
    # a key that a query cannot see (future, or gone) is not valid: however well it fits, it takes no mass
    candidates = make_candidates(seed=23, counts=[20], padding=1)
    loud = replace(candidates, logits2=torch.where(candidates.valid[:, None, None], candidates.logits2, 1e4))
    assert equal(select(candidates), select(loud))
    with pytest.raises(ValueError, match="recent_tokens"):
        HardKVConfig(recent_tokens=32, query_window=33)


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


def test_every_configured_policy_exists():
    field = HardKVConfig.__dataclass_fields__["policy"]
    assert set(field.metadata["choices"]) == set(POLICIES)
