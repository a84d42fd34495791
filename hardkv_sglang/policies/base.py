"""The seam between the runtime and the rules that choose the kept tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from hardkv_sglang.selection import Candidates, Scored, Selection


class Policy(ABC):
    """A rule that chooses which candidates of an event are kept.

    Scoring sees the lists of some layers at a time, because attention to all candidates is large; choosing sees all
    lists of the request. No value is read back to the host. The prefix and the recent window are not candidates: no
    policy can drop them.
    """

    @property
    @abstractmethod
    def needs_keys(self) -> bool:
        """Whether the runtime must fill `Candidates.keys`."""

    @property
    @abstractmethod
    def needs_values(self) -> bool:
        """Whether the runtime must fill `Candidates.values`."""

    @abstractmethod
    def score(self, candidates: Candidates) -> Scored:
        """Score every candidate; lists do not influence each other."""

    @abstractmethod
    def choose(self, scored: Scored, temperature: torch.Tensor | None = None) -> Selection:
        """Choose what is kept.

        temperature: [B] float32, `Selection.temperature` of an earlier event or a prior; 0 for a list that is
        not calibrated yet. None calibrates every list.
        """

    def select(self, candidates: Candidates, temperature: torch.Tensor | None = None) -> Selection:
        """Score and choose at once, where all lists are at hand."""
        return self.choose(self.score(candidates), temperature)
