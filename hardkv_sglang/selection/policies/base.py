"""The seam between the runtime and the rules that choose the kept tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from hardkv_sglang.selection.importance import measure_importance
from hardkv_sglang.selection.top_p import Candidates, Importance, Lists, Scored, Selection


class Policy(ABC):
    """A rule that chooses which candidates of an event are kept.

    Scoring measures attention, then rates candidates by it. It sees the lists of some layers at a time, because
    attention to all candidates is large; choosing sees all lists of the request. No value is read back to the host.
    The prefix and the recent window are not candidates: no policy can drop them.
    """

    @property
    @abstractmethod
    def needs_keys(self) -> bool:
        """Whether the runtime must fill `Lists.keys`."""

    @property
    @abstractmethod
    def needs_values(self) -> bool:
        """Whether the runtime must fill `Lists.values`."""

    @property
    @abstractmethod
    def reductions(self) -> tuple[str, str]:
        """How attention is reduced over the query heads of a KV head, and over queries: see `measure_importance`."""

    @abstractmethod
    def rate(self, importance: Importance, lists: Lists) -> Scored:
        """Score every candidate by its measured importance; lists do not influence each other."""

    def score(self, candidates: Candidates) -> Scored:
        """Measure in torch, then rate."""
        return self.rate(measure_importance(candidates, *self.reductions), candidates)

    @abstractmethod
    def choose(self, scored: Scored, temperature: torch.Tensor | None = None) -> Selection:
        """Choose what is kept.

        temperature: [B] float32, `Selection.temperature` of an earlier event or a prior; 0 for a list that is
        not calibrated yet. None calibrates every list.
        """

    def select(self, candidates: Candidates, temperature: torch.Tensor | None = None) -> Selection:
        """Score and choose at once, where all lists are at hand."""
        return self.choose(self.score(candidates), temperature)
