"""Running requests side by side, a row each: what admission and relief ask of all of them at once.

Owned by the planner, which alone writes it: a row whenever it has changed the request's `RequestState`, and a first one
before the request decodes. Columns do not depend on the request's length, so a decode step without events writes
nothing. A row of a request that has ended keeps its last values, but for the pages that early events gave back.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hardkv_sglang.lifecycle.request_state import RequestState
from hardkv_sglang.lifecycle.schedule import NEVER, EventSchedule


class Tiers(NamedTuple):
    """Fields of `RequestState` and lengths from which something holds (`NEVER`: it does not), int64 [N] each."""

    is_managed: Any  # 0 before the first decode step, and for a request that stays dense
    prefix_end: Any
    condensed_end: Any
    recent_start: Any
    condensed_pages: Any
    survivor_pages: Any  # 0 while unknown
    settled_from: Any  # the survivors may be used
    next_condense: Any  # expected; `NOW` for one that only waits for its turn
    observed_from: Any  # enough queries are recorded for a select event; `NEVER` while none are
    due_from: Any  # an event is due
    first_drop: Any  # end of the sparse tier, not a length
    early_pages: Any

    @property
    def sparse_span(self) -> Any:
        """Positions in the sparse tier, kept or not."""
        return self.recent_start - self.condensed_end


class RequestTable:
    """Rows are those of req_to_token."""

    def __init__(self, schedule: EventSchedule, num_rows: int) -> None:
        self.schedule = schedule
        self.columns = np.zeros((len(Tiers._fields), num_rows), np.int64)
        self._early_pages = Tiers(*self.columns).early_pages

    @property
    def early_pages(self) -> int:
        """Of all requests."""
        return int(self._early_pages.sum())

    def take(self, rows: NDArray[np.int64]) -> Tiers:
        """Columns of these rows."""
        return Tiers(*self.columns.take(rows, axis=1))

    def write(self, state: RequestState) -> None:
        """Enter a request under compression as it is now."""
        self.columns[:, state.row] = self.tiers(state)

    def write_dense(self, state: RequestState, stays_dense: bool) -> None:
        """Enter a request before its first decode step, or one that will never be compressed."""
        tiers = self.tiers(state)._replace(is_managed=0)
        self.columns[:, state.row] = tiers._replace(next_condense=NEVER) if stays_dense else tiers

    def clear(self, row: int) -> None:
        """The request has ended."""
        self._early_pages[row] = 0

    def tiers(self, state: RequestState) -> Tiers:
        """A request's row."""
        schedule = self.schedule
        return Tiers(
            is_managed=1,
            prefix_end=state.prefix_end,
            condensed_end=state.condensed_end,
            recent_start=state.recent_start,
            condensed_pages=state.num_condensed_pages,
            survivor_pages=state.survivor_pages or 0,
            settled_from=schedule.settled_from(state),
            next_condense=schedule.next_condense(state),
            observed_from=schedule.observed_from(state),
            due_from=min(schedule.condense_from(state), schedule.select_from(state)),
            first_drop=schedule.first_drop(state),
            early_pages=state.early_pages,
        )
