"""The same number of tokens for every KV head: the budget of the methods that HARD-KV is compared with."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hardkv_sglang.calibration import uncalibrated
from hardkv_sglang.config import HardKVConfig
from hardkv_sglang.importance import METRICS, across_distributions, measure_importance
from hardkv_sglang.selection import Candidates, Selection, bound_counts, mass_kept


@dataclass(frozen=True)
class UniformPolicy:
    """Keep the `uniform_tokens` best candidates of every list by one metric.

    Ties, and so lists without a valid query, keep the newest.
    """

    options: HardKVConfig
    metric: str

    @property
    def needs_keys(self) -> bool:
        """See `Policy.needs_keys`."""
        return METRICS[self.metric].needs_keys

    def select(self, candidates: Candidates, temperature: torch.Tensor | None = None) -> Selection:
        """See `Policy.select`; there is nothing to calibrate."""
        del temperature
        options, valid = self.options, candidates.valid
        importance = measure_importance(candidates, options.group_reduction, options.query_reduction)
        scores = METRICS[self.metric].score(importance, candidates, options)
        budget = options.uniform_tokens
        keep = bound_counts(valid, across_distributions(scores, importance), valid, floor=budget, cap=budget)
        calibration = uncalibrated(valid)
        mass = mass_kept(importance.mean, keep)
        return Selection(keep, calibration.temperature, mass, calibration.infeasible)
