"""Choosing without sorting: the same sets as by sorting, in bounded temporary memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hardkv_sglang.selection import top_p as top_p_module
from hardkv_sglang.selection.heaviest import ONE, best, heaviest
from hardkv_sglang.selection.top_p import bound_counts, shared_best_set, shared_top_p_set

VALUES = st.sampled_from([0.0, -0.0, 1e-45, 1e-30, 2.0**-49, 2.0**-48, 3.0**-20, 1e-3, 0.1, 0.1, 0.25, 0.5, 1.0])
TOP_P = st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.995, 0.9999999, 1 - 2.0**-48])


def by_sorting(mass: torch.Tensor, valid: torch.Tensor, top_p: float) -> torch.Tensor:
    assert mass.numel() <= top_p_module.MAX_SORTED
    return shared_top_p_set(mass, valid, top_p)


@given(
    st.lists(st.one_of(VALUES, st.floats(0, 1, width=32)), min_size=1, max_size=60), st.integers(1, 4), TOP_P,
    st.sampled_from([torch.float32, torch.float64]), st.integers(1, 70), st.data(),
)  # fmt: skip
@settings(deadline=None, max_examples=300)
def test_same_set_as_sorting(values, lists: int, top_p: float, dtype: torch.dtype, chunk: int, data) -> None:
    values = values * lists
    valid = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values))))
    mass = torch.where(valid, torch.tensor(values, dtype=dtype), 0.0).view(lists, -1)
    want = by_sorting(mass, valid.view(lists, -1), top_p)
    got = heaviest(mass.flatten(), int((1.0 - top_p) * ONE) * lists, chunk)
    assert torch.equal(got.view_as(mass), want)


@given(
    st.lists(st.one_of(VALUES, st.floats(0, 1, width=32)), min_size=1, max_size=60), st.integers(0, 70),
    st.sampled_from([torch.float32, torch.float64]), st.integers(1, 70), st.data(),
)  # fmt: skip
@settings(deadline=None, max_examples=300)
def test_same_number_as_sorting(values, count: int, dtype: torch.dtype, chunk: int, data) -> None:
    valid = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values))))
    scores = torch.where(valid, torch.tensor(values, dtype=dtype), 0.0)
    want = shared_best_set(scores[None], valid[None], count)[0]
    assert int(want.sum()) == min(count, int(valid.sum()))
    assert torch.equal(best(scores, valid, count, chunk), want)


@pytest.mark.parametrize("seed", range(4))
def test_same_set_at_the_size_of_an_event(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long tails and many equal masses, chosen by both ways through the public function."""
    g = torch.Generator().manual_seed(seed)
    mass = torch.rand(24, 5000, generator=g) ** (8 * seed + 1)
    mass = (mass / mass.sum(1, keepdim=True) * torch.rand(24, 1, generator=g)).half().float()
    valid = torch.rand(mass.shape, generator=g) < 0.9
    mass = torch.where(valid, mass, 0.0)
    want = by_sorting(mass, valid, 0.98)
    best_set = shared_best_set(mass, valid, 20_000)
    monkeypatch.setattr(top_p_module, "MAX_SORTED", 1000)
    assert torch.equal(shared_top_p_set(mass, valid, 0.98), want)
    assert torch.equal(shared_best_set(mass, valid, 20_000), best_set)
    assert 0 < int(want.sum()) < want.numel()


def test_floor_and_cap_of_many_lists_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    importance, valid = torch.rand(7, 300, generator=g), torch.rand(7, 300, generator=g) < 0.8
    chosen = valid & (torch.rand(7, 300, generator=g) < 0.3)
    want = bound_counts(chosen, importance, valid, 8, 96, 32)
    for size in (1, 700, 2000):
        monkeypatch.setattr(top_p_module, "MAX_SORTED", size)
        assert torch.equal(bound_counts(chosen, importance, valid, 8, 96, 32), want)


@pytest.mark.gpu
def test_memory_of_a_long_event_is_bounded() -> None:
    """29 M candidates, for which sorting takes 1 GB."""
    mass = torch.rand(288, 100_000, device="cuda") ** 20
    mass /= mass.sum(1, keepdim=True)
    valid = torch.ones(mass.shape, dtype=torch.bool, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    shared_top_p_set(mass, valid, 0.995)
    shared_best_set(mass, valid, 1_000_000)
    assert torch.cuda.max_memory_allocated() - before < 150 << 20
