"""Calibration: the temperature that makes a metric as peaked as the attention it stands for.

Sizes as in `top_p.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hardkv_sglang.selection.top_p import ONE, droppable, fixed_point, row_max

BISECTION_STEPS = 30
"""Halvings of the log2 T interval: 12 / 2**30 is below the resolution of a float32 temperature."""
TOLERANCE = 1e-3
"""Probability by which a calibrated list may exceed top_p before it is flagged."""
LOG2_FLOOR = -126.0
"""Scores below the smallest normal float32 count as that, so that logarithms stay finite."""


@dataclass(frozen=True)
class Calibration:
    """Result of `calibrate`, per list."""

    temperature: torch.Tensor  # [B] float32, 0 where there was nothing to calibrate on
    infeasible: torch.Tensor  # [B] bool, clamped: the target's mass is below top_p, or above by > TOLERANCE

    @classmethod
    def join(cls, parts: Sequence[Calibration]) -> Calibration:
        """Of the lists of several parts, in their order."""
        return cls(torch.cat([p.temperature for p in parts]), torch.cat([p.infeasible for p in parts]))


def uncalibrated(valid: torch.Tensor) -> Calibration:
    """T = 1 for every list of valid ([B, N] bool)."""
    shape, device = valid.shape[:1], valid.device
    return Calibration(torch.ones(shape, device=device), torch.zeros(shape, dtype=torch.bool, device=device))


def reuse(fresh: Calibration, temperature: torch.Tensor | None) -> Calibration:
    """Keep what an earlier event calibrated: `temperature` ([B] float32) where it is not 0."""
    if temperature is None:
        return fresh
    known = temperature > 0
    return Calibration(torch.where(known, temperature, fresh.temperature), fresh.infeasible & ~known)


def prior_temperature(temperatures: torch.Tensor, infeasible: torch.Tensor) -> torch.Tensor:
    """One temperature per list from many events: the geometric mean of those that were solved.

    temperatures, infeasible: [E, B] of E events. Returns [B] float32, 0 (not calibrated) for a list that was
    never solved, as `Policy.select` expects.
    """
    solved = (temperatures > 0) & ~infeasible
    total = torch.where(solved, temperatures.clamp(min=1e-30).log2(), 0.0).sum(0)
    number = solved.sum(0)
    return torch.where(number > 0, (total / number.clamp(min=1)).exp2(), 0.0).float()


def log2_scores(scores: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Metric logits y, base 2, [B, V, N]: minus infinity for padding.

    scores: [B, V, N] float, not negative; valid: [B, N] bool.
    """
    logits2 = scores.clamp(min=2.0**LOG2_FLOOR).log2()
    return logits2.masked_fill(~valid[:, None, :], -math.inf)


def calibrated_mass(logits2: torch.Tensor, mass: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """Candidate mass spread by softmax(y / T): one probability space for every metric, [B, V, N].

    logits2: [B, V, N] of `log2_scores`; mass: [B, V], attention mass of all candidates; temperature: [B], 0
    counts as 1. Each distribution sums to its mass; padding is 0.
    """
    used = torch.where(temperature > 0, temperature, 1.0).to(logits2.dtype)
    top = row_max(logits2, LOG2_FLOOR)
    weight = torch.exp2((logits2 - top) / used[:, None, None])
    # the best candidate has weight 1, so the clamp only acts on empty lists
    return weight * (mass[..., None] / weight.sum(-1, keepdim=True).clamp(min=1.0))


def calibrate(
    logits2: torch.Tensor, mass: torch.Tensor, target: torch.Tensor, top_p: float, limit: float
) -> Calibration:
    """Find T per list such that the n* best candidates by the metric carry exactly what Top-p asks for.

    logits2: [B, V, N] of `log2_scores`; mass: [B, V], attention mass of all candidates; target: [B, V, N]
    bool, the n* best by the metric, n* being the Top-p count of the attention itself; limit: T is sought in
    [1 / limit, limit].

    Solves mean of (A + mass * M(T)) = top_p over the distributions with n* > 0, where A = 1 - mass and M(T)
    is the share of the target in softmax(y / T). M never rises with T, so bisection in log T is exact. T to
    infinity gives n* / n; T to 0 gives min(1, n* / multiplicity of the maximum): pooling repeats the maximum,
    so peaked lists may have no solution. Returns the low end of the last interval, where the mass is not
    below top_p: with one distribution, Top-p at that T chooses n* candidates, less those of negligible mass.
    """
    active = target.any(-1)  # [B, V]
    outside = active[..., None] & ~target
    num_active = active.sum(-1)

    def dropped(temperature: torch.Tensor) -> torch.Tensor:
        spread = calibrated_mass(logits2, mass, temperature)
        return fixed_point(torch.where(outside, spread, 0.0)).sum((1, 2))

    allowed = num_active * droppable(top_p)
    high = torch.full_like(num_active, math.log2(limit), dtype=mass.dtype)
    low = -high
    for _ in range(BISECTION_STEPS):
        middle = (low + high) / 2
        enough = dropped(middle.exp2().float()) <= allowed
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    temperature = low.exp2().float()
    surplus = allowed - dropped(temperature)
    infeasible = (surplus < 0) | (surplus > num_active * int(TOLERANCE * ONE))
    return Calibration(torch.where(num_active > 0, temperature, 0.0), infeasible)
