"""HARD-KV: keep the smallest set of candidates that carries the share `top_p`, per KV head or over all of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hardkv_sglang.config import HardKVConfig
from hardkv_sglang.selection.calibration import (
    Calibration,
    calibrate,
    calibrated_mass,
    log2_scores,
    reuse,
    uncalibrated,
)
from hardkv_sglang.selection.importance import (
    METRICS,
    Metric,
    across_distributions,
)
from hardkv_sglang.selection.policies.base import Policy
from hardkv_sglang.selection.policies.uniform import UniformPolicy
from hardkv_sglang.selection.top_p import (
    BoundCounts,
    Importance,
    Lists,
    Scored,
    Selection,
    ascending_order,
    last_in_order,
    mass_kept,
    shared_best_set,
    shared_top_p_set,
    top_p_counts,
    top_p_set,
)


def hardkv_policy(options: HardKVConfig, page_size: int, bound: BoundCounts) -> Policy:
    """Top-p budgets, or its metric with one budget for all heads (`budget=uniform`)."""
    if options.budget == "uniform":
        return UniformPolicy(options, options.metric, bound)
    return HardKVPolicy(options, page_size, bound)


@dataclass(frozen=True)
class HardKVPolicy(Policy):
    """Calibrated Top-p (HARD-KV, arXiv 2606.28831), floor `min_tokens`, cap `max_tokens`.

    With `kept_share` the best tokens of all lists stay, as many as that share of what left the recent window so far.
    Below p = 1 a list keeps the union over its distributions of each one's Top-p set, then fills its last head page:
    that costs no memory. p = 1 chooses every candidate, and so does an event without a valid query, which knows
    nothing. The cap bounds the tables, so it holds in both cases too.
    """

    options: HardKVConfig
    page_size: int
    bound: BoundCounts

    @property
    def metric(self) -> Metric:
        """The configured importance metric."""
        return METRICS[self.options.metric]

    @property
    def needs_keys(self) -> bool:
        """See `Policy.needs_keys`."""
        return self.metric.needs_keys

    @property
    def needs_values(self) -> bool:
        """See `Policy.needs_values`."""
        return self.metric.needs_values

    @property
    def reductions(self) -> tuple[str, str]:
        """See `Policy.reductions`."""
        return self.options.group_reduction, self.options.query_reduction

    def rate(self, importance: Importance, lists: Lists) -> Scored:
        """See `Policy.rate`."""
        scores = self.metric.score(importance, lists, self.options)
        return Scored(scores, importance, lists.valid, num_aged=lists.valid.shape[-1])

    def choose(self, scored: Scored, temperature: torch.Tensor | None = None) -> Selection:
        """See `Policy.choose`."""
        options, valid, importance = self.options, scored.valid, scored.importance
        chosen, calibration = self._choose(scored, temperature)
        ranking = across_distributions(scored.scores, importance)
        keep = self.bound(chosen, ranking, valid, options.min_tokens, options.max_tokens, self.page_size)
        return Selection(keep, calibration.temperature, mass_kept(importance.mean, keep), calibration.infeasible)

    def _choose(self, scored: Scored, temperature: torch.Tensor | None) -> tuple[torch.Tensor, Calibration]:
        """The set before floor, cap and page filling, [B, N] bool, and the temperatures that gave it."""
        valid, importance, top_p = scored.valid, scored.importance, self.options.top_p
        if top_p == 1.0 and self.options.kept_share is None:
            return valid, uncalibrated(valid)
        if self.options.kept_share is not None:
            mass, calibration = self._spread_all(scored, temperature)
            count = int(self.options.kept_share * scored.num_aged * len(valid))
            chosen = shared_best_set(mass[:, 0], valid, count)
        elif self.options.budget == "shared":
            mass, calibration = self._spread_all(scored, temperature)
            chosen = shared_top_p_set(mass[:, 0], valid, top_p)
        else:
            chosen, calibration = self._choose_per_list(scored, temperature)
        if self.options.guarantee == "raw":
            means = [(part.importance.mean, part.valid) for part, _ in scored.parts(None)]
            chosen |= torch.cat([top_p_set(mean, ascending_order(mean, exist), top_p) for mean, exist in means])
        return torch.where(importance.observed, chosen & valid, valid), calibration

    def _choose_per_list(self, scored: Scored, temperature: torch.Tensor | None) -> tuple[torch.Tensor, Calibration]:
        """Each list's own Top-p set, some lists at a time: sorting takes many times the memory of the scores."""
        chosen, calibrations = [], []
        for part, known in scored.parts(temperature):
            mass, calibration = self._spread(part, known)
            chosen.append(top_p_set(mass, part.order, self.options.top_p).any(1))
            calibrations.append(calibration)
        return torch.cat(chosen), Calibration.join(calibrations)

    def _spread_all(self, scored: Scored, temperature: torch.Tensor | None) -> tuple[torch.Tensor, Calibration]:
        """`_spread` over all lists, some at a time where it sorts."""
        if self.metric.unit in ("probability", "energy"):
            return self._spread(scored, temperature)
        masses, calibrations = zip(*[self._spread(*part) for part in scored.parts(temperature)], strict=True)
        return torch.cat(masses), Calibration.join(calibrations)

    def _spread(self, scored: Scored, temperature: torch.Tensor | None) -> tuple[torch.Tensor, Calibration]:
        """The probabilities that Top-p acts on, [B, V, N], and the temperatures that gave them."""
        options, attention, valid = self.options, scored.importance.distributions, scored.valid
        if self.metric.unit == "probability":
            return scored.scores, uncalibrated(valid)
        if self.metric.unit == "energy":
            total = scored.scores.sum((1, 2), keepdim=True)
            if options.budget == "shared":
                total = total.mean(0, keepdim=True)
            return scored.scores / torch.where(total > 0, total, 1.0), uncalibrated(valid)
        logits2, mass = log2_scores(scored.scores, valid), attention.sum(-1)
        if options.calibration == "none":
            calibration = uncalibrated(valid)
        else:
            by_attention = ascending_order(attention, valid[:, None, :])
            target = last_in_order(scored.order, top_p_counts(attention, by_attention, options.top_p))
            fresh = calibrate(logits2, mass, target, options.top_p, options.temperature_limit)
            calibration = reuse(fresh, temperature)
        return calibrated_mass(logits2, mass, calibration.temperature), calibration
