from __future__ import annotations

import oracle
import pytest
import torch
from candidate_factory import TOP_P
from hypothesis import given, settings
from hypothesis import strategies as st

from hardkv_sglang.selection.top_p import (
    ONE,
    ascending_order,
    bound_counts,
    droppable,
    fixed_point,
    last_in_order,
    mass_kept,
    top_p_counts,
    top_p_set,
)


@st.composite
def masses(draw: st.DrawFn, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """(mass [B, N] with sums below 1, valid [B, N])."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 1 << 20)))
    B, N = draw(st.integers(1, 3)), draw(st.integers(0, 50))
    valid = torch.rand(B, N, generator=g) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    weight = torch.randn(B, N, generator=g, dtype=torch.float64).mul(draw(st.sampled_from([0.1, 2.0, 8.0]))).exp()
    weight = weight.masked_fill(~valid, 0.0)
    always = draw(st.sampled_from([0.0, 0.2, 0.97]))
    mass = weight / weight.sum(-1, keepdim=True).clamp(min=1e-9) * (1 - always)
    return mass.to(dtype), valid


def as_sets(mask: torch.Tensor) -> list[set[int]]:
    return [{j for j, kept in enumerate(row) if kept} for row in mask.tolist()]


@settings(max_examples=60, deadline=None)
@given(data=masses(), top_p=st.sampled_from(TOP_P))
def test_top_p_set_equals_oracle(data, top_p):
    mass, valid = data
    actual = as_sets(top_p_set(mass, ascending_order(mass, valid), top_p))
    for b, row in enumerate(mass.tolist()):
        tokens = {j: row[j] for j in range(len(row)) if valid[b, j]}
        assert actual[b] == oracle.top_p_set(tokens, 1.0 - sum(tokens.values()), top_p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@settings(max_examples=40, deadline=None)
@given(data=st.data(), top_p=st.floats(0.01, 0.999999))
def test_top_p_set_carries_p_and_is_minimal(dtype, data, top_p):
    mass, valid = data.draw(masses(dtype=dtype))
    kept = top_p_set(mass, ascending_order(mass, valid), top_p)
    assert not (kept & ~valid & (mass > 0)).any()
    dropped = fixed_point(mass.masked_fill(kept, 0.0)).sum(-1)
    assert (dropped <= droppable(top_p)).all()
    smallest = torch.where(kept, fixed_point(mass), ONE).amin(-1) if mass.shape[-1] else dropped
    assert ((dropped + smallest > droppable(top_p)) | ~kept.any(-1)).all()


@settings(max_examples=40, deadline=None)
@given(data=masses(), low=st.floats(0.01, 0.99), high=st.floats(0.01, 0.99))
def test_top_p_sets_are_nested(data, low, high):
    mass, valid = data
    order = ascending_order(mass, valid)
    small, large = (top_p_set(mass, order, p) for p in sorted((low, high)))
    assert not (small & ~large).any()


@settings(max_examples=40, deadline=None)
@given(data=masses(dtype=torch.float32), top_p=st.sampled_from(TOP_P), seed=st.integers(0, 1 << 20))
def test_top_p_set_permutation_equivariant(data, top_p, seed):
    mass, valid = data
    permutation = torch.randperm(mass.shape[-1], generator=torch.Generator().manual_seed(seed))
    kept = top_p_set(mass, ascending_order(mass, valid), top_p)
    moved = top_p_set(mass[:, permutation], ascending_order(mass[:, permutation], valid[:, permutation]), top_p)
    assert torch.equal(moved, kept[:, permutation])


@settings(max_examples=30, deadline=None)
@given(data=masses(), top_p=st.sampled_from(TOP_P))
def test_top_p_set_preserves_order(data, top_p):
    mass, valid = data
    kept = top_p_set(mass, ascending_order(mass, valid), top_p)
    worst_kept = torch.where(kept, mass, 2.0)
    best_dropped = torch.where(valid & ~kept, mass, -1.0)
    assert (worst_kept[:, :, None] >= best_dropped[:, None, :]).all()


def test_top_p_nothing_needed_when_always_kept_mass_suffices():
    mass = torch.tensor([[0.04, 0.01], [0.06, 0.01]])
    order = ascending_order(mass, torch.ones_like(mass, dtype=torch.bool))
    assert top_p_counts(mass, order, 0.94).tolist() == [0, 1]


def test_top_p_boundary_keeps():
    # quarters are exact in binary: 3/4 is reached by exactly three of four, and not by two
    mass = torch.full((1, 4), 0.25)
    order = ascending_order(mass, torch.ones(1, 4, dtype=torch.bool))
    assert [top_p_counts(mass, order, p).item() for p in (0.25, 0.5, 0.75, 0.7500001)] == [1, 2, 3, 4]


def test_equal_scores_keep_the_later_position():
    mass = torch.tensor([[0.2, 0.2, 0.2, 0.2, 0.2]])
    valid = torch.tensor([[True, True, True, True, True]])
    assert as_sets(top_p_set(mass, ascending_order(mass, valid), 0.5)) == [{2, 3, 4}]
    keep = bound_counts(torch.zeros_like(valid), mass, valid, 2, None)
    assert as_sets(keep) == [{3, 4}]


def test_fixed_point_sum_does_not_depend_on_order():
    # adding these floats one by one gives different sums in the two directions
    mass = torch.tensor([[0.6, 1e-8, 0.1, 1e-8, 0.3 - 2e-8]])
    assert fixed_point(mass).cumsum(-1)[0, -1] == fixed_point(mass.flip(-1)).cumsum(-1)[0, -1]
    assert fixed_point(torch.ones(1)).item() == ONE
    assert fixed_point(torch.tensor([1.0, 0.75, 0.25]) * 2.0**-48).tolist() == [1, 1, 0]


@pytest.mark.parametrize("top_p", [0.01, 0.9, 0.95, 0.999999])
def test_droppable_rounds_toward_keeping(top_p):
    assert droppable(top_p) / ONE <= 1.0 - top_p < (droppable(top_p) + 1) / ONE


def test_invalid_candidates_come_first_wherever_they_stand():
    valid = torch.tensor([[True, False, True, False]])
    assert ascending_order(torch.zeros(1, 4), valid).tolist() == [[1, 3, 0, 2]]
    keep = bound_counts(torch.zeros_like(valid), torch.zeros(1, 4), valid, 1, None)
    assert as_sets(keep) == [{2}]


def test_last_in_order():
    order = torch.tensor([[2, 0, 3, 1], [0, 1, 2, 3]])
    assert as_sets(last_in_order(order, torch.tensor([2, 0]))) == [{1, 3}, set()]


@pytest.mark.parametrize("size", [0, 1, 31, 32, 33, 64])
@pytest.mark.parametrize(("floor", "cap"), [(0, None), (32, 32), (32, None), (1, 33), (40, 64)])
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 1 << 20), fraction=st.sampled_from([0.0, 0.3, 1.0]))
def test_bound_counts_equals_oracle(size, floor, cap, seed, fraction):
    g = torch.Generator().manual_seed(seed)
    valid = torch.arange(size + 3) >= 3
    importance = torch.randint(6, (1, size + 3), generator=g).double()  # many ties
    chosen = valid & (torch.rand(1, size + 3, generator=g) < fraction)
    keep = bound_counts(chosen, importance, valid[None], floor, cap)
    best = sorted(range(3, size + 3), key=lambda j: (not chosen[0, j], -importance[0, j].item(), -j))
    count = min(max(int(chosen.sum()), floor), size if cap is None else cap, size)
    assert as_sets(keep) == [set(best[:count])]


def test_mass_kept_counts_always_kept_mass():
    importance = torch.tensor([[0.3, 0.2, 0.0]], dtype=torch.float64)
    kept = mass_kept(importance, torch.tensor([[True, False, False]]))
    assert kept.dtype == torch.float32
    assert kept.item() == pytest.approx(0.8)
