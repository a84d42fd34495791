"""HARD-KV: every KV head keeps the smallest set of candidates that carries attention mass `top_p`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hardkv_sglang.calibration import (
    Calibration,
    calibrate,
    calibrated_mass,
    log2_scores,
    reuse,
    uncalibrated,
)
from hardkv_sglang.config import HardKVConfig
from hardkv_sglang.importance import (
    METRICS,
    Importance,
    Metric,
    across_distributions,
    measure_importance,
)
from hardkv_sglang.policies.base import Policy
from hardkv_sglang.policies.uniform import UniformPolicy
from hardkv_sglang.selection import (
    Candidates,
    Selection,
    ascending_order,
    bound_counts,
    last_in_order,
    mass_kept,
    top_p_counts,
    top_p_set,
)


def hardkv_policy(options: HardKVConfig) -> Policy:
    """Budgets per KV head, or its metric with one budget for all heads (`budget=uniform`, an ablation)."""
    if options.budget == "uniform":
        return UniformPolicy(options, metric=options.metric)
    return HardKVPolicy(options)


@dataclass(frozen=True)
class HardKVPolicy:
    """Calibrated Top-p per KV head (HARD-KV, arXiv 2606.28831), floor `min_tokens`, cap `max_tokens`.

    Below p = 1 a list keeps the union over its distributions of each one's Top-p set. p = 1 chooses every
    candidate, and so does an event without a valid query, which knows nothing. The cap bounds the tables, so
    it holds in both cases too.
    """

    options: HardKVConfig

    @property
    def metric(self) -> Metric:
        """The configured importance metric."""
        return METRICS[self.options.metric]

    @property
    def needs_keys(self) -> bool:
        """See `Policy.needs_keys`."""
        return self.metric.needs_keys

    def select(self, candidates: Candidates, temperature: torch.Tensor | None = None) -> Selection:
        """See `Policy.select`."""
        options, valid = self.options, candidates.valid
        importance = measure_importance(candidates, options.group_reduction, options.query_reduction)
        scores = self.metric.score(importance, candidates, options)
        chosen, calibration = self._choose(scores, importance, valid, temperature)
        ranking = across_distributions(scores, importance)
        keep = bound_counts(chosen, ranking, valid, options.min_tokens, options.max_tokens)
        mass = mass_kept(importance.mean, keep)
        return Selection(keep, calibration.temperature, mass, calibration.infeasible)

    def _choose(
        self,
        scores: torch.Tensor,
        importance: Importance,
        valid: torch.Tensor,
        temperature: torch.Tensor | None,
    ) -> tuple[torch.Tensor, Calibration]:
        """The set before floor and cap, [B, N] bool, and the temperatures that gave it."""
        top_p = self.options.top_p
        if top_p == 1.0:
            return valid, uncalibrated(valid)
        order = ascending_order(scores, valid[:, None, :])
        mass, calibration = self._spread(scores, order, importance, valid, temperature)
        chosen = top_p_set(mass, order, top_p).any(1)
        if self.options.guarantee == "raw":
            chosen |= top_p_set(importance.mean, ascending_order(importance.mean, valid), top_p)
        return torch.where(importance.observed, chosen & valid, valid), calibration

    def _spread(
        self,
        scores: torch.Tensor,
        order: torch.Tensor,
        importance: Importance,
        valid: torch.Tensor,
        temperature: torch.Tensor | None,
    ) -> tuple[torch.Tensor, Calibration]:
        """The probabilities that Top-p acts on, [B, V, N], and the temperatures that gave them."""
        options, attention = self.options, importance.distributions
        if self.metric.is_attention:
            return scores, uncalibrated(valid)
        logits2, mass = log2_scores(scores, valid), attention.sum(-1)
        if options.calibration == "none":
            calibration = uncalibrated(valid)
        else:
            by_attention = ascending_order(attention, valid[:, None, :])
            target = last_in_order(order, top_p_counts(attention, by_attention, options.top_p))
            fresh = calibrate(logits2, mass, target, options.top_p, options.temperature_limit)
            calibration = reuse(fresh, temperature)
        return calibrated_mass(logits2, mass, calibration.temperature), calibration
