"""Memory pressure: which events run before they are due, so that SGLang need not retract a request.

A select event needs queries recorded for `query_window` steps, a condense event needs the select event's counts and
pages to copy into. So relief looks ahead over the steps that both take, and acts while pages are left.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hardkv_sglang.lifecycle.planner import LifecyclePlanner
from hardkv_sglang.lifecycle.request_state import View
from hardkv_sglang.lifecycle.step_plan import NO_EARLY_EVENTS, EarlyEvents
from hardkv_sglang.lifecycle.tiers import COUNT_DELAY, WORTHWHILE_PAGES, Bounds, Stage, largest_copy, stages_and_gains

Integers = NDArray[np.int64]


class PressureRelief:
    """Chooses early events from page counts alone.

    rows, lens: requests under compression as rows of the planner's table, and their lengths, [N] each.
    """

    def __init__(self, planner: LifecyclePlanner) -> None:
        self.cfg = cfg = planner.cfg
        self.table = planner.table
        self.kept = planner.kept
        self.page_size = cfg.layout.page_size
        # to record, to count, and as long again as the event of another request may have to wait for its turn
        self.lookahead = planner.query_window + 2 * COUNT_DELAY
        self.bounds = Bounds(
            page_size=self.page_size,
            recent_tokens=cfg.options.recent_tokens,
            max_sparse_span=cfg.max_sparse_span,
            min_kept_tokens=cfg.min_kept_tokens,
            head_page_tokens=cfg.layout.head_page_tokens,
            max_condensed_pages=cfg.max_condensed_pages,
            share_span=planner.kept.span,
        )

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
        rows = np.fromiter([state.row for state, _ in views], np.int64, len(views))
        lens = np.fromiter([seq_len for _, seq_len in views], np.int64, len(views))
        lacking_pages = self.reserve(rows, lens, np.array(seq_lens, np.int64)) - available_pages
        if lacking_pages <= 0:
            return NO_EARLY_EVENTS
        stages, gains = self.rank(rows, lens)
        chosen = self._most_first(stages, gains, lacking_pages)
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

    def reserve(self, rows: Integers, lens: Integers, seq_lens: Integers) -> int:
        """Token pages that must be free for relief to act in time; seq_lens: lengths of all running requests."""
        opened = (seq_lens + self.lookahead - 1) // self.page_size - (seq_lens - 1) // self.page_size
        return self.largest_copy(rows, lens) + int(opened.sum())

    def largest_copy(self, rows: Integers, lens: Integers) -> int:
        """Token pages that the largest condense event to come copies into; others are passed over."""
        return int(largest_copy(self.table.by_row, rows, lens, self.kept.shares, self.bounds))

    def rank(self, rows: Integers, lens: Integers) -> tuple[Integers, Integers]:
        """`Stage` of each request, and token pages that it is expected to give back with its next events."""
        stages, gains = stages_and_gains(self.table.by_row, rows, lens, self.kept.shares, self.bounds)
        return stages, gains

    def warm_up(self) -> None:
        """Compile now what would otherwise be compiled while the pool runs low."""
        nobody = np.empty(0, np.int64)
        self.largest_copy(nobody, nobody)
        self.rank(nobody, nobody)
