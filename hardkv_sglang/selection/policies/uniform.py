"""The same number of tokens for every KV head: the budget of the methods that HARD-KV is compared with."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hardkv_sglang.config import HardKVConfig
from hardkv_sglang.selection.calibration import uncalibrated
from hardkv_sglang.selection.importance import METRICS, across_distributions
from hardkv_sglang.selection.policies.base import Policy
from hardkv_sglang.selection.top_p import BoundCounts, Importance, Lists, Scored, Selection, mass_kept


@dataclass(frozen=True)
class UniformPolicy(Policy):
    """Keep the `uniform_tokens` best candidates of every list by one metric.

    Ties, and so lists without a valid query, keep the newest.
    """

    options: HardKVConfig
    metric: str
    bound: BoundCounts

    @property
    def needs_keys(self) -> bool:
        """See `Policy.needs_keys`."""
        return METRICS[self.metric].needs_keys

    @property
    def needs_values(self) -> bool:
        """See `Policy.needs_values`."""
        return METRICS[self.metric].needs_values

    @property
    def reductions(self) -> tuple[str, str]:
        """See `Policy.reductions`."""
        return self.options.group_reduction, self.options.query_reduction

    def rate(self, importance: Importance, lists: Lists) -> Scored:
        """See `Policy.rate`."""
        return Scored(METRICS[self.metric].score(importance, lists, self.options), importance, lists.valid)

    def choose(self, scored: Scored, temperature: torch.Tensor | None = None) -> Selection:
        """See `Policy.choose`; there is nothing to calibrate."""
        del temperature
        valid, budget = scored.valid, self.options.uniform_tokens
        ranking = across_distributions(scored.scores, scored.importance)
        keep = self.bound(valid, ranking, valid, budget, budget, 1)
        calibration = uncalibrated(valid)
        mass = mass_kept(scored.importance.mean, keep)
        return Selection(keep, calibration.temperature, mass, calibration.infeasible)


def uniform_policy(metric: str, options: HardKVConfig, page_size: int, bound: BoundCounts) -> UniformPolicy:
    """Keep `uniform_tokens` candidates of every list by this metric."""
    del page_size
    return UniformPolicy(options, metric, bound)
