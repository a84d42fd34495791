"""Floor, cap and page filling by kernel choose exactly what the torch definition chooses."""

from __future__ import annotations

import pytest
import torch

from hardkv_sglang.kernels.bound import PASS, bound_counts
from hardkv_sglang.selection.top_p import bound_counts as defined

SIZES = [0, 1, 31, 32, 33, 257, 700]


def draw(B: int, N: int, device: str, levels: int | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Chosen, scores and valid candidates, left-padded; `levels` different scores, so that many are equal."""
    g = torch.Generator().manual_seed(B * N + (levels or 0))
    padding = torch.randint(0, N + 1, (B,), generator=g)
    valid = torch.arange(N) >= padding[:, None]
    scores = torch.rand(B, N, generator=g) ** 8
    if levels is not None:
        scores = (scores * levels).floor() / levels
    # minus zero equals zero
    scores = torch.where(torch.rand(B, N, generator=g) < 0.1, -0.0, scores)
    chosen = valid & (torch.rand(B, N, generator=g) < torch.rand(B, 1, generator=g))
    return chosen.to(device), scores.to(device), valid.to(device)


@pytest.mark.parametrize("levels", [None, 3])
@pytest.mark.parametrize(("floor", "cap", "unit"), [(0, None, 1), (32, 64, 16), (5, 3, 1), (100, 500, 32)])
@pytest.mark.parametrize("N", SIZES)
def test_bound_counts(device: str, N: int, floor: int, cap: int | None, unit: int, levels: int | None) -> None:
    lists = 6 if device == "cuda" else 2  # the interpreter takes a second for each
    chosen, scores, valid = draw(lists, N, device, levels)
    keep = bound_counts(chosen, scores, valid, floor, cap, unit)
    assert torch.equal(keep, defined(chosen, scores, valid, floor, cap, unit))


def test_bound_counts_of_all_and_none(device: str) -> None:
    _, scores, valid = draw(4, 100, device, 3)
    for chosen in (valid, torch.zeros_like(valid)):
        assert torch.equal(bound_counts(chosen, scores, valid, 8, 40), defined(chosen, scores, valid, 8, 40))


def test_bound_counts_of_lists_longer_than_a_pass(device: str) -> None:
    chosen, scores, valid = draw(2, PASS + 300, device, 50)
    keep = bound_counts(chosen, scores, valid, 100, 1000, 32)
    assert torch.equal(keep, defined(chosen, scores, valid, 100, 1000, 32))
