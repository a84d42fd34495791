"""How much of the pool requests will need: their bounded footprint over the steps to come, not their maximal length.

A compressed request's dense tokens rise to a peak before each condense event and fall after it. Requests that started
together peak together, others do not; so the forecast sums over time (`usage_peak.py`) instead of adding up the peaks.
"""

from __future__ import annotations

from math import ceil

import numpy as np
from numpy.typing import NDArray

from hardkv_sglang.lifecycle.expectation import KeptShare
from hardkv_sglang.lifecycle.usage_peak import FIRST_CONDENSE, HELD, Outlook, Rules, insert_last, usage_peak
from hardkv_sglang.memory_pool.resolved_config import ResolvedConfig

FORECAST_ERROR = 0.005  # of the peak: without it, simulations of hundreds of requests in step retract some
EVENTS_PER_CYCLE = 2  # a select event and a condense event
ROOM = 32  # requests that a stack can take before it is copied


class OutlookStack:
    """Outlooks of requests that are to run together, and who of them has the next condense event first."""

    def __init__(self, outlooks: NDArray[np.float64]) -> None:
        """outlooks: [N, 8], in batch order."""
        self.size = len(outlooks)
        self._rows = np.empty((self.size + ROOM, outlooks.shape[1]))
        self._rows[: self.size] = outlooks
        self._order = np.empty(self.size + ROOM, np.int64)
        # overdue events have not happened yet
        self._order[: self.size] = np.argsort(np.maximum(outlooks[:, FIRST_CONDENSE], 1), kind="stable")

    @property
    def rows(self) -> NDArray[np.float64]:
        """One request a row, [N, 8], in the order in which they came."""
        return self._rows[: self.size]

    @property
    def order(self) -> NDArray[np.int64]:
        """Rows by their next condense event, [N]; those at the same step as they came."""
        return self._order[: self.size]

    def push(self, outlook: Outlook) -> None:
        """Put one request more at the end."""
        if self.size == len(self._rows):
            self._rows = np.concatenate((self._rows, np.empty_like(self._rows)))
            self._order = np.concatenate((self._order, np.empty_like(self._order)))
        self._rows[self.size] = outlook
        self.size += 1
        insert_last(self.order, self.rows)

    def truncate(self, size: int) -> None:
        """Take away those that came after the first `size`."""
        self._order[:size] = self.order[self.order < size]
        self.size = size


class UsageForecast:
    """Pool tokens that requests will hold, step by step."""

    def __init__(self, cfg: ResolvedConfig) -> None:
        options, layout = cfg.options, cfg.layout
        # condense events follow select events
        select_span = layout.page_ceil(options.select_interval)
        self.rules = Rules(
            page_size=layout.page_size,
            span=-(-options.condense_interval // select_span) * select_span,
            recent_tokens=options.recent_tokens,
            max_sparse_span=cfg.max_sparse_span,
            min_kept_tokens=cfg.min_kept_tokens,
            head_page_tokens=layout.head_page_tokens,
            max_condensed_tokens=cfg.max_condensed_pages * layout.page_size,
        )

    def growth(self, outlooks: OutlookStack, kept: KeptShare, events_per_step: int) -> int:
        """Most tokens that these requests will hold beyond what they hold now, with an error of the peak added.

        events_per_step: condense and select events of one step. The same to the token as looking at every request at
        every step.
        """
        rows, apart = outlooks.rows, EVENTS_PER_CYCLE / events_per_step
        peak = usage_peak(rows, outlooks.order, apart, kept.shares, kept.span, self.rules)
        return ceil(peak * (1 + FORECAST_ERROR) - float(rows[:, HELD].sum()))

    def warm_up(self, kept: KeptShare) -> None:
        """Compile now what the first forecast would."""
        stack = OutlookStack(np.zeros((1, len(Outlook._fields))))
        stack.push(Outlook(*stack.rows[0]))
        self.growth(stack, kept, 1)
