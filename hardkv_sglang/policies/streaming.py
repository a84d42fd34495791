"""StreamingLLM: the oldest tokens (attention sinks) and the recent window, whatever the queries say."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hardkv_sglang.calibration import uncalibrated
from hardkv_sglang.config import HardKVConfig
from hardkv_sglang.importance import measure_importance
from hardkv_sglang.selection import Candidates, Selection, mass_kept


@dataclass(frozen=True)
class StreamingPolicy:
    """Keep the `sink_tokens` oldest candidates of every list (StreamingLLM, arXiv 2309.17453).

    The recent window needs no choice: it is never a candidate. Attention is measured only to report its
    mass.
    """

    options: HardKVConfig

    @property
    def needs_keys(self) -> bool:
        """See `Policy.needs_keys`."""
        return False

    def select(self, candidates: Candidates, temperature: torch.Tensor | None = None) -> Selection:
        """See `Policy.select`; there is nothing to calibrate."""
        del temperature
        valid = candidates.valid
        keep = valid & (valid.cumsum(-1) <= self.options.sink_tokens)
        calibration = uncalibrated(valid)
        mass = mass_kept(measure_importance(candidates, "mean", "mean").mean, keep)
        return Selection(keep, calibration.temperature, mass, calibration.infeasible)
