"""The seam between the runtime and the rules that choose the kept tokens."""

from __future__ import annotations

from typing import Protocol

import torch

from hardkv_sglang.selection import Candidates, Selection


class Policy(Protocol):
    """A rule that chooses, list by list, which candidates of an event are kept.

    Lists never influence each other, and no value is read back to the host. The prefix and the recent window
    are not candidates: no policy can drop them.
    """

    @property
    def needs_keys(self) -> bool:
        """Whether the runtime must fill `Candidates.keys`."""

    def select(self, candidates: Candidates, temperature: torch.Tensor | None = None) -> Selection:
        """Choose what is kept.

        temperature: [B] float32, `Selection.temperature` of an earlier event or a prior; 0 for a list that is
        not calibrated yet. None calibrates every list.
        """
