"""Memory pressure: which events run before they are due, so that SGLang need not retract a request.

A select event needs queries recorded for `query_window` steps, a condense event needs the select event's counts and
pages to copy into. So relief looks ahead over the steps that both take, and acts while pages are left.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hardkv_sglang.lifecycle.planner import LifecyclePlanner
from hardkv_sglang.lifecycle.request_state import View
from hardkv_sglang.lifecycle.request_table import Tiers
from hardkv_sglang.lifecycle.schedule import COUNT_DELAY, NEVER
from hardkv_sglang.lifecycle.step_plan import NO_EARLY_EVENTS, EarlyEvents

WORTHWHILE_PAGES = 1  # least net gain of an early event

Integers = NDArray[np.int64]


class Stage(IntEnum):
    """How far a request is from giving pages back, in the order in which relief counts on it."""

    DUE = 0  # an event is due anyway
    COUNTING = 1  # selected, its counts are on their way
    CONDENSABLE = 2  # survivors are known
    SELECTABLE = 3  # its queries are recorded
    OBSERVED = 4  # its queries are being recorded
    UNOBSERVED = 5


class PressureRelief:
    """Chooses early events from page counts alone: `Tiers` of all requests at once, with their lengths `[N]`."""

    def __init__(self, planner: LifecyclePlanner) -> None:
        self.cfg = planner.cfg
        self.table = planner.table
        self.kept = planner.kept
        self.page_size = planner.cfg.layout.page_size
        # to record, to count, and as long again as the event of another request may have to wait for its turn
        self.lookahead = planner.query_window + 2 * COUNT_DELAY

    def is_rescue(self, seq_lens: Sequence[int], available_pages: int) -> bool:
        """Whether the next decode step fits, but would not without the pages that early events gave back."""
        early_pages = self.table.early_pages
        return early_pages > 0 and 0 <= available_pages - self._opened_now(seq_lens) < early_pages

    def _opened_now(self, seq_lens: Sequence[int]) -> int:
        return sum(seq_len % self.page_size == 0 for seq_len in seq_lens)

    def choose(self, views: Sequence[View], seq_lens: Sequence[int], available_pages: int) -> EarlyEvents:
        """Early events, those that free most first, until they make up for what the reserve lacks.

        views: requests under compression; seq_lens: lengths of all running requests; available_pages: token pages that
        are free.
        """
        opened = -(-self.lookahead // self.page_size) + 1
        if available_pages >= self.cfg.max_condensed_pages + opened * len(seq_lens):
            return NO_EARLY_EVENTS  # the usual case, without a look at each request
        of = self.table.take(np.array([state.row for state, _ in views], np.int64))
        lens = np.array([seq_len for _, seq_len in views], np.int64)
        lacking_pages = self.reserve(of, lens, np.array(seq_lens, np.int64)) - available_pages
        if lacking_pages <= 0:
            return NO_EARLY_EVENTS
        stages = self.stages(of, lens)
        chosen = self._most_first(stages, self.gains(of, lens), lacking_pages)
        stage = stages[chosen]
        has_event = (stage == Stage.CONDENSABLE) | (stage == Stage.SELECTABLE)
        events = [views[i] for i in chosen[has_event].tolist()]
        observes = [views[i] for i in chosen[stage == Stage.UNOBSERVED].tolist()]
        return EarlyEvents(hurry=True, events=events, observes=observes)

    def _most_first(self, stages: Integers, gains: Integers, lacking_pages: int) -> Integers:
        """Requests to count on: by stage, those that free most first, as few as free what is lacking."""
        order = np.lexsort((-gains, stages))
        order = order[gains[order] >= WORTHWHILE_PAGES]
        freed = gains[order].cumsum()
        return order[: freed.searchsorted(lacking_pages) + 1]

    def reserve(self, of: Tiers, lens: Integers, seq_lens: Integers) -> int:
        """Token pages that must be free for relief to act in time.

        of, lens: requests under compression; seq_lens: lengths of all running requests.
        """
        opened = (seq_lens + self.lookahead - 1) // self.page_size - (seq_lens - 1) // self.page_size
        return self.largest_copy(of, lens) + int(opened.sum())

    def largest_copy(self, of: Tiers, lens: Integers) -> int:
        """Token pages that the largest condense event to come copies into; only of requests under compression."""
        if not len(lens):
            return 0
        target = np.maximum(self._select_target(of, lens), of.recent_start)
        pages = np.where(lens >= of.settled_from, of.survivor_pages, self._expected_survivors(of, target))
        return int((pages * of.is_managed).max())

    def stages(self, of: Tiers, lens: Integers) -> Integers:
        """`Stage` of each request."""
        is_settled = lens >= of.settled_from
        conditions = (
            lens >= of.due_from,
            is_settled & (self._condense_gains(of) >= WORTHWHILE_PAGES),
            (of.sparse_span > 0) & ~is_settled,
            lens >= of.observed_from,
            of.observed_from < NEVER,
        )
        stages = (Stage.DUE, Stage.CONDENSABLE, Stage.COUNTING, Stage.SELECTABLE, Stage.OBSERVED)
        return np.select(conditions, stages, Stage.UNOBSERVED)

    def gains(self, of: Tiers, lens: Integers) -> Integers:
        """Token pages that each request is expected to give back with its next events."""
        is_settled = lens >= of.settled_from
        condensed = self._condense_gains(of)
        target = self._select_target(of, lens)
        selects = is_settled | (of.sparse_span == 0)  # another select event comes before its condense event
        is_idle = selects & ((target <= of.recent_start) | (target < of.first_drop))
        target = np.where(selects, target, of.recent_start)
        span = (target - of.condensed_end) // self.page_size
        selected = np.where(is_idle, 0, span + of.condensed_pages - self._expected_survivors(of, target))
        return np.where(is_settled & (condensed >= WORTHWHILE_PAGES), condensed, selected)

    def _condense_gains(self, of: Tiers) -> Any:
        """Token pages that condense events of now give back, less those that they take, where survivors are known."""
        return of.sparse_span // self.page_size + of.condensed_pages - of.survivor_pages

    def _select_target(self, of: Tiers, lens: Integers) -> Any:
        aged_end = (lens - self.cfg.options.recent_tokens) // self.page_size * self.page_size
        return np.minimum(aged_end, of.condensed_end + self.cfg.max_sparse_span)

    def _expected_survivors(self, of: Tiers, target: Integers) -> Any:
        """Token pages that survivors of all before `target` are expected to need."""
        aged = (target - of.prefix_end).clip(min=0)
        expected = np.maximum(self.kept.tokens(aged).astype(np.int64), np.minimum(aged, self.cfg.min_kept_tokens))
        pages = np.maximum(-(-expected // self.page_size), of.condensed_pages)
        return pages.clip(max=self.cfg.max_condensed_pages)
