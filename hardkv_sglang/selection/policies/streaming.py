"""StreamingLLM: the oldest tokens (attention sinks) and the recent window, whatever the queries say."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hardkv_sglang.config import HardKVConfig
from hardkv_sglang.selection.calibration import uncalibrated
from hardkv_sglang.selection.policies.base import Policy
from hardkv_sglang.selection.top_p import BoundCounts, Importance, Lists, Scored, Selection, mass_kept


@dataclass(frozen=True)
class StreamingPolicy(Policy):
    """Keep the `sink_tokens` oldest candidates of every list (StreamingLLM, arXiv 2309.17453).

    The recent window needs no choice: it is never a candidate. Attention is measured only to report its
    mass.
    """

    options: HardKVConfig

    @property
    def needs_keys(self) -> bool:
        """See `Policy.needs_keys`."""
        return False

    @property
    def needs_values(self) -> bool:
        """See `Policy.needs_values`."""
        return False

    @property
    def reductions(self) -> tuple[str, str]:
        """See `Policy.reductions`."""
        return "mean", "mean"

    def rate(self, importance: Importance, lists: Lists) -> Scored:
        """See `Policy.rate`."""
        return Scored(importance.distributions, importance, lists.valid)

    def choose(self, scored: Scored, temperature: torch.Tensor | None = None) -> Selection:
        """See `Policy.choose`; there is nothing to calibrate."""
        del temperature
        valid = scored.valid
        keep = valid & (valid.cumsum(-1) <= self.options.sink_tokens)
        calibration = uncalibrated(valid)
        mass = mass_kept(scored.importance.mean, keep)
        return Selection(keep, calibration.temperature, mass, calibration.infeasible)


def streaming_policy(options: HardKVConfig, page_size: int, bound: BoundCounts) -> StreamingPolicy:
    """Keep sinks and the recent window."""
    del page_size, bound
    return StreamingPolicy(options)
