"""Rules that are measured but not shipped."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hardkv_sglang.calibration import uncalibrated
from hardkv_sglang.importance import METRICS, across_distributions, measure_importance
from hardkv_sglang.policies.hardkv import HardKVPolicy
from hardkv_sglang.selection import Candidates, Selection, ascending_order, bound_counts, last_in_order, mass_kept


@dataclass(frozen=True)
class ThresholdPolicy(HardKVPolicy):
    """Keep every candidate whose importance is at least `threshold`, floor and cap as for Top-p.

    For a number of kept tokens over all lists, this drops the least attention mass: the last token that one head
    keeps weighs as much as the last of any other. Top-p instead gives every head the same coverage, and so spends
    most tokens on heads whose attention is spread thin.
    """

    threshold: float  # attention probability

    def select(self, candidates: Candidates, temperature: torch.Tensor | None = None) -> Selection:
        """See `Policy.select`; there is nothing to calibrate."""
        del temperature
        options, valid = self.options, candidates.valid
        importance = measure_importance(candidates, options.group_reduction, options.query_reduction)
        ranking = across_distributions(METRICS[options.metric].score(importance, candidates, options), importance)
        chosen = (ranking >= self.threshold) & valid
        keep = bound_counts(chosen, ranking, valid, options.min_tokens, options.max_tokens)
        calibration = uncalibrated(valid)
        return Selection(keep, calibration.temperature, mass_kept(importance.mean, keep), calibration.infeasible)


@dataclass(frozen=True)
class PageFillingPolicy(HardKVPolicy):
    """Top-p, then every list is filled up to whole head pages by importance: more tokens in the same bytes."""

    page_size: int

    def select(self, candidates: Candidates, temperature: torch.Tensor | None = None) -> Selection:
        """See `Policy.select`."""
        selection = super().select(candidates, temperature)
        options, valid, keep = self.options, candidates.valid, selection.keep
        importance = measure_importance(candidates, options.group_reduction, options.query_reduction)
        ranking = across_distributions(self.metric.score(importance, candidates, options), importance)
        # kept candidates first, then by importance
        order = ascending_order(ranking, valid)
        order = order.gather(-1, keep.gather(-1, order).to(torch.uint8).argsort(dim=-1, stable=True))
        counts = -(-keep.sum(-1) // self.page_size) * self.page_size
        filled = last_in_order(order, torch.minimum(counts, valid.sum(-1)))
        mass = mass_kept(importance.mean, filled)
        return Selection(filled, selection.temperature, mass, selection.infeasible)
