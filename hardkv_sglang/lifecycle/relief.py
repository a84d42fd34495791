"""Memory pressure: which events run before they are due, so that SGLang need not retract a request.

A select event needs queries recorded for `query_window` steps, a condense event needs the select event's counts and
pages to copy into. So relief looks ahead over the steps that both take, and acts while pages are left.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import IntEnum

import numpy as np

from hardkv_sglang.lifecycle.planner import LifecyclePlanner
from hardkv_sglang.lifecycle.request_state import RequestState, View
from hardkv_sglang.lifecycle.schedule import COUNT_DELAY
from hardkv_sglang.lifecycle.snapshot import UNKNOWN, Snapshot
from hardkv_sglang.lifecycle.step_plan import NO_EARLY_EVENTS, EarlyEvents

WORTHWHILE_PAGES = 1  # least net gain of an early event


class Stage(IntEnum):
    """How far a request is from giving pages back, in the order in which relief counts on it."""

    DUE = 0  # an event is due anyway
    COUNTING = 1  # selected, its counts are on their way
    CONDENSABLE = 2  # survivors are known
    SELECTABLE = 3  # its queries are recorded
    OBSERVED = 4  # its queries are being recorded
    UNOBSERVED = 5


class PressureRelief:
    """Chooses early events from page counts alone."""

    def __init__(self, planner: LifecyclePlanner) -> None:
        self.cfg = planner.cfg
        self.schedule = planner.schedule
        self.kept = planner.kept
        self.page_size = planner.cfg.layout.page_size
        # to record, to count, and as long again as the event of another request may have to wait for its turn
        self.lookahead = planner.query_window + 2 * COUNT_DELAY

    def reserve(self, views: Sequence[View], seq_lens: Iterable[int]) -> int:
        """Token pages that must be free for relief to act in time.

        views: requests under compression; seq_lens: lengths of all running requests.
        """
        return self.copy_pages(views) + sum(self.pages_opened(seq_len) for seq_len in seq_lens)

    def copy_pages(self, views: Iterable[View]) -> int:
        """Token pages that the largest condense event to come copies into."""
        return max((self.survivors(*view) for view in views), default=0)

    def largest_copy(self, of: Snapshot) -> int:
        """`copy_pages` of many requests at once."""
        if not len(of.seq_len):
            return 0
        aged_end = (of.seq_len - self.cfg.options.recent_tokens) // self.page_size * self.page_size
        target = np.minimum(aged_end, of.condensed_end + self.cfg.max_sparse_span)
        aged = np.maximum(target, of.recent_start) - of.prefix_end
        expected = np.maximum(self.kept.tokens(aged).astype(np.int64), np.minimum(aged, self.cfg.min_kept_tokens))
        pages = np.maximum(-(-expected // self.page_size), of.num_condensed_pages)
        is_settled = (of.survivor_pages != UNKNOWN) & (of.seq_len >= of.selected_at + COUNT_DELAY)
        return int(np.where(is_settled, of.survivor_pages, pages.clip(max=self.cfg.max_condensed_pages)).max())

    def pages_opened(self, seq_len: int) -> int:
        """Token pages that a request takes in the steps ahead."""
        return (seq_len + self.lookahead - 1) // self.page_size - (seq_len - 1) // self.page_size

    def survivors(self, state: RequestState, seq_len: int) -> int:
        """Token pages into which the next condense event will copy, or is expected to."""
        if state.survivor_pages is not None and self.schedule.is_settled(state, seq_len):
            return state.survivor_pages
        return self._expected_survivors(state, max(self.schedule.select_target(state, seq_len), state.recent_start))

    def _expected_survivors(self, state: RequestState, target: int) -> int:
        aged = target - state.prefix_end
        expected = max(int(self.kept.share(aged) * aged), min(aged, self.cfg.min_kept_tokens))
        pages = max(-(-expected // self.page_size), state.num_condensed_pages)
        return min(pages, self.cfg.max_condensed_pages)

    def is_rescue(self, views: Sequence[View], seq_lens: Iterable[int], available_pages: int) -> bool:
        """Whether the next decode step fits, but would not without the pages that early events gave back."""
        spare = available_pages - sum(seq_len % self.page_size == 0 for seq_len in seq_lens)
        return 0 <= spare < sum(state.early_pages for state, _ in views)

    def choose(self, views: Sequence[View], seq_lens: Sequence[int], available_pages: int) -> EarlyEvents:
        """Early events, those that free most first, until they make up for what the reserve lacks.

        views, seq_lens: see `reserve`; available_pages: token pages that are free.
        """
        opened = -(-self.lookahead // self.page_size) + 1
        if available_pages >= self.cfg.max_condensed_pages + opened * len(seq_lens):
            return NO_EARLY_EVENTS  # the usual case, without a look at each request
        lacking_pages = self.reserve(views, seq_lens) - available_pages
        if lacking_pages <= 0:
            return NO_EARLY_EVENTS
        events: list[View] = []
        observes: list[View] = []
        ranked = [(self._stage(*view), -self._gain(*view), view) for view in views]
        for stage, loss, view in sorted(ranked, key=lambda entry: entry[:2]):
            if lacking_pages <= 0:
                break
            if -loss < WORTHWHILE_PAGES:
                continue
            lacking_pages += loss
            if stage in (Stage.CONDENSABLE, Stage.SELECTABLE):
                events.append(view)
            elif stage is Stage.UNOBSERVED:
                observes.append(view)
        return EarlyEvents(hurry=True, events=events, observes=observes)

    def _stage(self, state: RequestState, seq_len: int) -> Stage:
        schedule = self.schedule
        if schedule.overdue(state, seq_len) >= 0:
            return Stage.DUE
        if schedule.is_settled(state, seq_len) and schedule.condense_gain(state) >= WORTHWHILE_PAGES:
            return Stage.CONDENSABLE
        if state.sparse_span > 0 and not schedule.is_settled(state, seq_len):
            return Stage.COUNTING
        if schedule.is_observed(state, seq_len):
            return Stage.SELECTABLE
        return Stage.UNOBSERVED if state.ring_slot is None else Stage.OBSERVED

    def _gain(self, state: RequestState, seq_len: int) -> int:
        """Token pages that the request is expected to give back with its next events."""
        schedule = self.schedule
        if schedule.is_settled(state, seq_len) and schedule.condense_gain(state) >= WORTHWHILE_PAGES:
            return schedule.condense_gain(state)
        target = state.recent_start
        if state.sparse_span == 0 or schedule.is_settled(state, seq_len):
            target = schedule.select_target(state, seq_len)
            if target <= state.recent_start or not schedule.may_drop(state, target):
                return 0
        span = (target - state.condensed_end) // self.page_size
        return span + state.num_condensed_pages - self._expected_survivors(state, target)
