"""When events of a request are due, and what they can give back: pure functions of its state and length."""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil

from hardkv_sglang.lifecycle.request_state import RequestState, View
from hardkv_sglang.lifecycle.tiers import COUNT_DELAY, NEVER, NOW
from hardkv_sglang.memory_pool.resolved_config import ResolvedConfig


class EventSchedule:
    """The intervals of the options, in whole pages, and the rules that keep events from running for nothing.

    seq_len: tokens of the request with KV written or in flight.
    """

    def __init__(self, cfg: ResolvedConfig) -> None:
        self.cfg = cfg
        options, layout = cfg.options, cfg.layout
        self.recent_tokens = options.recent_tokens
        self.query_window = options.query_window
        self.select_span = layout.page_ceil(options.select_interval)
        self.condense_span = layout.page_ceil(options.condense_interval)
        self.max_sparse_span, self.min_kept_tokens = cfg.max_sparse_span, cfg.min_kept_tokens

    def due(self, views: Iterable[View]) -> list[View]:
        """Requests with an event that is due, the longest waiting first.

        Condense events come before select events: they give pages back, and requests that started together get
        them one by one instead of after all the others' select events.
        """
        overdue = [(self.overdue(state, seq_len), (state, seq_len)) for state, seq_len in views]
        waiting = [(not self.condense_is_due(*view), -tokens, view) for tokens, view in overdue if tokens >= 0]
        return [view for *_, view in sorted(waiting, key=lambda entry: entry[:2])]

    def overdue(self, state: RequestState, seq_len: int) -> int:
        """Tokens since the next event of this request was due; negative when none is."""
        if self.condense_is_due(state, seq_len):
            return seq_len - state.selected_at
        return seq_len - self.next_select(state) if self.select_is_due(state, seq_len) else -1

    def event_budget(self, num_requests: int) -> int:
        """Requests that may have an event in one step.

        Half as many again as the steady state needs: requests that started together then spread out by themselves,
        instead of making one step in every interval wait for all their events.
        """
        per_token = 1 / self.select_span + 1 / self.condense_span
        return min(self.cfg.options.max_events_per_step, ceil(1.5 * num_requests * per_token))

    def next_select(self, state: RequestState) -> int:
        """Length at which the next select event is due: a whole interval has left the recent window, and selecting can
        drop something. `NEVER` while the sparse tier has no room for that."""
        target = self.cfg.layout.page_ceil(max(state.recent_start + self.select_span, self.first_drop(state)))
        if target > state.condensed_end + self.max_sparse_span:
            return NEVER
        return target + self.recent_tokens

    def observe_from(self, state: RequestState, seq_len: int) -> int:
        """First position, from now on, whose query the next select event on schedule will read."""
        return max(seq_len, self.next_select(state) - self.query_window)

    def select_target(self, state: RequestState, seq_len: int) -> int:
        """End of the sparse tier after a select event of now."""
        aged = self.cfg.layout.page_floor(seq_len - self.recent_tokens)
        return min(aged, state.condensed_end + self.max_sparse_span)

    def select_is_due(self, state: RequestState, seq_len: int) -> bool:
        """Whether it is time for a select event, and enough queries are recorded for one."""
        return seq_len >= self.select_from(state)

    def select_from(self, state: RequestState) -> int:
        """Length from which a select event is due."""
        return max(self.next_select(state), self.observed_from(state))

    def observed_from(self, state: RequestState) -> int:
        """Length from which enough queries are recorded for a select event; `NEVER` while none are."""
        return NEVER if state.ring_slot is None else state.observe_from + self.query_window

    def first_drop(self, state: RequestState) -> int:
        """Least target with which events can give back anything: lists at their floor cannot shrink, unless packed.

        Once the sparse tier is full, waiting helps no more, unless no list can ever outgrow its floor.
        """
        if self.cfg.options.min_freed_pages == 0 or self.cfg.layout.survivors.is_packed:
            return 0
        floor = self.min_kept_tokens
        outgrown = state.prefix_end + floor + 1
        if floor >= self.cfg.max_context_len:
            return outgrown
        return min(outgrown, state.condensed_end + self.max_sparse_span - self.select_span + 1)

    def condense_is_due(self, state: RequestState, seq_len: int) -> bool:
        """Whether the sparse tier is long enough, its survivors are known, and condensing does more than copy."""
        return seq_len >= self.condense_from(state)

    def condense_from(self, state: RequestState) -> int:
        """Length from which a condense event is due; `NEVER` until the next select event changes that."""
        if state.survivor_pages is None or state.sparse_span < self.condense_span or not self._is_worth_a_copy(state):
            return NEVER
        return self.settled_from(state)

    def is_settled(self, state: RequestState, seq_len: int) -> bool:
        """Whether a condense event may run: the survivors are known."""
        return seq_len >= self.settled_from(state)

    def settled_from(self, state: RequestState) -> int:
        """Length from which the survivors may be used; `NEVER` while they are unknown."""
        return NEVER if state.survivor_pages is None else state.selected_at + COUNT_DELAY

    def condense_gain(self, state: RequestState) -> int:
        """Token pages that a condense event of now gives back, less those that it takes. Survivors must be known."""
        assert state.survivor_pages is not None
        return state.sparse_span // self.cfg.layout.page_size + state.num_condensed_pages - state.survivor_pages

    def _is_worth_a_copy(self, state: RequestState) -> bool:
        """A full sparse tier is condensed even if nothing is gained: only that makes room for later events."""
        is_full = state.sparse_span + self.select_span > self.max_sparse_span  # no room for another interval
        return is_full or self.condense_gain(state) >= self.cfg.options.min_freed_pages

    def next_condense(self, state: RequestState) -> int:
        """Length at which the next condense event is expected, on schedule; `NOW` for one that waits for counts or for
        its turn."""
        is_worth = state.survivor_pages is None or self._is_worth_a_copy(state)
        if state.sparse_span >= self.condense_span and is_worth:
            return NOW
        missing = max(1, ceil((self.condense_span - state.sparse_span) / self.select_span))
        selected_at = state.recent_start + missing * self.select_span + self.recent_tokens
        return max(selected_at, state.observe_from + self.query_window) + COUNT_DELAY

    def wakes_at(self, state: RequestState) -> int:
        """Length from which a planned step may do something for the request; until then it is not looked at."""
        acts = state.observe_from if state.ring_slot is None else self.select_from(state)
        return min(acts, self.settled_from(state) if state.is_unread else self.condense_from(state))

    def steps_to_first_condense(self, prefix_end: int, seq_len: int) -> int:
        """Decode steps until the first condense event of a request that has not decoded yet."""
        selected_at = prefix_end + max(1, ceil(self.condense_span / self.select_span)) * self.select_span
        return max(selected_at + self.recent_tokens, seq_len + self.query_window) - seq_len + COUNT_DELAY
