"""Relief as it is defined: request by request, from their states."""

from __future__ import annotations

from collections.abc import Sequence

from hardkv_sglang.lifecycle.relief import PressureRelief
from hardkv_sglang.lifecycle.request_state import RequestState, View
from hardkv_sglang.lifecycle.schedule import EventSchedule
from hardkv_sglang.lifecycle.step_plan import NO_EARLY_EVENTS, EarlyEvents
from hardkv_sglang.lifecycle.tiers import WORTHWHILE_PAGES, Stage


def reserve(self: PressureRelief, views: Sequence[View], seq_lens: Sequence[int]) -> int:
    """Token pages that must be free for relief to act in time."""
    page, ahead = self.page_size, self.lookahead
    return copy_pages(self, views) + sum((n + ahead - 1) // page - (n - 1) // page for n in seq_lens)


def copy_pages(self: PressureRelief, views: Sequence[View]) -> int:
    """Token pages that the largest condense event to come copies into."""
    return max((survivors(self, *view) for view in views), default=0)


def survivors(self: PressureRelief, state: RequestState, seq_len: int) -> int:
    """Token pages into which the next condense event will copy, or is expected to."""
    schedule = schedule_of(self)
    if state.survivor_pages is not None and schedule.is_settled(state, seq_len):
        return state.survivor_pages
    return expected_survivors(self, state, max(schedule.select_target(state, seq_len), state.recent_start))


def expected_survivors(self: PressureRelief, state: RequestState, target: int) -> int:
    aged = target - state.prefix_end
    floor = -(-min(aged, self.cfg.min_kept_tokens) // self.cfg.layout.head_page_tokens)
    expected = -(-int(self.kept.share(aged) * aged) // self.page_size)
    pages = max(expected, floor, state.num_condensed_pages)
    return min(pages, self.cfg.max_condensed_pages)


def is_rescue(self: PressureRelief, views: Sequence[View], seq_lens: Sequence[int], available_pages: int) -> bool:
    """Whether the next decode step fits, but would not without the pages that early events gave back."""
    spare = available_pages - sum(seq_len % self.page_size == 0 for seq_len in seq_lens)
    return 0 <= spare < sum(state.early_pages for state, _ in views)


def choose(self: PressureRelief, views: Sequence[View], seq_lens: Sequence[int], available_pages: int) -> EarlyEvents:
    """Early events, those that free most first, until they make up for what the reserve lacks."""
    opened = -(-self.lookahead // self.page_size) + 1
    if available_pages >= self.cfg.max_condensed_pages + opened * len(seq_lens):
        return NO_EARLY_EVENTS
    lacking_pages = reserve(self, views, seq_lens) - available_pages
    if lacking_pages <= 0:
        return NO_EARLY_EVENTS
    events: list[View] = []
    observes: list[View] = []
    ranked = [(stage_of(self, *view), -gain_of(self, *view), view) for view in views]
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


def stage_of(self: PressureRelief, state: RequestState, seq_len: int) -> Stage:
    schedule = schedule_of(self)
    if schedule.overdue(state, seq_len) >= 0:
        return Stage.DUE
    if schedule.is_settled(state, seq_len) and schedule.condense_gain(state) >= WORTHWHILE_PAGES:
        return Stage.CONDENSABLE
    if state.sparse_span > 0 and not schedule.is_settled(state, seq_len):
        return Stage.COUNTING
    if state.ring_slot is not None and seq_len - state.observe_from >= schedule.query_window:
        return Stage.SELECTABLE
    return Stage.UNOBSERVED if state.ring_slot is None else Stage.OBSERVED


def gain_of(self: PressureRelief, state: RequestState, seq_len: int) -> int:
    """Token pages that the request is expected to give back with its next events."""
    schedule = schedule_of(self)
    if schedule.is_settled(state, seq_len) and schedule.condense_gain(state) >= WORTHWHILE_PAGES:
        return schedule.condense_gain(state)
    target = state.recent_start
    if state.sparse_span == 0 or schedule.is_settled(state, seq_len):
        target = schedule.select_target(state, seq_len)
        if target <= state.recent_start or target < schedule.first_drop(state):
            return 0
    span = (target - state.condensed_end) // self.page_size
    return span + state.num_condensed_pages - expected_survivors(self, state, target)


def schedule_of(self: PressureRelief) -> EventSchedule:
    return self.table.schedule
