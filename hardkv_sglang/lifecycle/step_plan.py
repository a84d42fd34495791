"""What one decode step does beside decoding: planned on the host, run by `events/executor.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hardkv_sglang.lifecycle.request_state import RequestState, View


@dataclass(frozen=True)
class ObserveOp:
    """Record the queries of a row in a ring slot, from this step on."""

    row: int
    ring_slot: int


@dataclass(frozen=True)
class SelectOp:
    """Score condensed tokens and `[condensed_end, recent_start)`, then publish what is kept."""

    state: RequestState
    row: int
    prefix_end: int
    condensed_end: int
    old_recent_start: int  # end of the sparse tier while the queries were observed
    recent_start: int  # end of the sparse tier from now on
    first_query: int  # positions of the observation queries: [first_query, seq_len)
    seq_len: int
    condensed_list_bound: int
    recalibrate: bool
    ring_slot: int
    remembered_end: int = 0  # end of the dense positions that the event before measured
    measured_end: int = 0  # end of those that this one measures, if it looks beyond the candidates

    @property
    def num_candidates(self) -> int:
        """Entries of each list, padding included."""
        return self.condensed_list_bound + self.recent_start - self.condensed_end

    @property
    def scanned_end(self) -> int:
        """End of the positions whose attention is measured: the candidates', or some of the recent window's."""
        return max(self.recent_start, self.measured_end)


@dataclass(frozen=True)
class CondenseOp:
    """Copy the selected survivors into `slots` and forget the dense slots of `[start, end)`."""

    state: RequestState
    row: int
    slots: Any
    start: int
    end: int

    @property
    def is_first(self) -> bool:
        """Whether no token of the request was condensed before."""
        return self.start == self.state.prefix_end


@dataclass(frozen=True)
class EarlyEvents:
    """What to do before it is due, because the pool runs low."""

    hurry: bool = False  # run as many events in one step as allowed, instead of spreading them
    events: Sequence[View] = ()  # condense if that gives a page back, else select
    observes: Sequence[View] = ()  # record queries from this step on


NO_EARLY_EVENTS = EarlyEvents()


@dataclass
class StepPlan:
    """Device work of one decode step, in the order in which it runs."""

    observes: list[ObserveOp] = field(default_factory=list)
    condenses: list[CondenseOp] = field(default_factory=list)
    selects: list[SelectOp] = field(default_factory=list)
    freed_pages: int = 0
    allocated_pages: int = 0
    postponed: int = 0  # condense events that the pool could not serve
    early: int = 0  # events among the above that were not due

    @property
    def num_events(self) -> int:
        """Requests that have an event in this step."""
        return len(self.selects) + len(self.condenses)

    @property
    def rows(self) -> list[int]:
        """Request rows whose lists the events rewrite."""
        return [op.row for op in self.condenses] + [op.row for op in self.selects]

    @property
    def is_empty(self) -> bool:
        """Whether the step runs no device work of ours."""
        return not (self.observes or self.condenses or self.selects)
