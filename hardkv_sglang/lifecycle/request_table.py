"""Running requests side by side, a row each: what admission and relief ask of all of them at once.

Owned by the planner, which alone writes it: a row whenever it has changed the request's `RequestState`, and a first one
before the request decodes. Columns do not depend on the request's length, so a decode step without events writes
nothing. A row of a request that has ended keeps its last values, but for the pages that early events gave back.
"""

from __future__ import annotations

import numpy as np

from hardkv_sglang.lifecycle.request_state import RequestState
from hardkv_sglang.lifecycle.schedule import EventSchedule
from hardkv_sglang.lifecycle.tiers import NEVER, Tiers


class RequestTable:
    """Rows are those of req_to_token."""

    def __init__(self, schedule: EventSchedule, num_rows: int) -> None:
        self.schedule = schedule
        self.columns = np.zeros((len(Tiers._fields), num_rows), np.int64)
        self.by_row = Tiers(*self.columns)

    @property
    def early_pages(self) -> int:
        """Of all requests."""
        return int(self.by_row.early_pages.sum())

    def write(self, state: RequestState) -> None:
        """Enter a request under compression as it is now."""
        self.columns[:, state.row] = self.tiers(state)

    def write_dense(self, state: RequestState, stays_dense: bool) -> None:
        """Enter a request before its first decode step, or one that will never be compressed."""
        tiers = self.tiers(state)._replace(is_managed=0)
        self.columns[:, state.row] = tiers._replace(next_condense=NEVER) if stays_dense else tiers

    def clear(self, row: int) -> None:
        """The request has ended."""
        self.by_row.early_pages[row] = 0

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
