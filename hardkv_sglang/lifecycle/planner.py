"""When tokens move from tier to tier (`request_state.py`): host bookkeeping only.

Decisions depend on token counts and on page counts that are equal on every tensor-parallel rank, so that all
ranks take the same ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from hardkv_sglang.lifecycle.expectation import PRIOR_SHARE, KeptShare
from hardkv_sglang.lifecycle.request_state import RequestState, View
from hardkv_sglang.lifecycle.request_table import RequestTable
from hardkv_sglang.lifecycle.schedule import EventSchedule
from hardkv_sglang.lifecycle.step_plan import NO_EARLY_EVENTS, CondenseOp, EarlyEvents, ObserveOp, SelectOp, StepPlan
from hardkv_sglang.memory_pool.resolved_config import ResolvedConfig


class PageAllocator(Protocol):
    """What planning needs of SGLang's allocator. Slots are opaque device tensors here."""

    def alloc_pages(self, num_pages: int) -> Any | None:
        """Slots of `num_pages` fresh token pages, or None when the pool cannot give them."""

    def free_pages(self, slots: Any) -> None:
        """Return whole token pages."""

    def free_row(self, row: int, start: int, end: int) -> None:
        """Return the token pages behind positions `[start, end)` of a row; `start` is a page boundary."""


class LifecyclePlanner:
    """Plans the events of each decode step."""

    def __init__(self, cfg: ResolvedConfig) -> None:
        self.cfg = cfg
        self.schedule = EventSchedule(cfg)
        self.table = RequestTable(self.schedule, cfg.num_rows)
        self.query_window = cfg.options.query_window
        self.kept = KeptShare(self.schedule.select_span, cfg.pool_tokens(PRIOR_SHARE))  # of all requests so far
        self.free_ring_slots = list(range(cfg.num_ring_slots))

    def admit(self, row: int, prompt_len: int, protected_len: int, seq_len: int) -> RequestState:
        """State of a request at its first decode step (again after a retraction).

        prompt_len: tokens of the prompt; protected_len: tokens that the radix tree owns; seq_len: tokens with KV.
        """
        prefix_end = self.cfg.layout.page_ceil(max(prompt_len, protected_len))
        state = RequestState(row, prefix_end, prefix_end, prefix_end, 0)
        state.observe_from = self.schedule.observe_from(state, seq_len)
        self._enter(state)
        return state

    def expect(self, row: int, prompt_len: int, seq_len: int, stays_dense: bool) -> None:
        """Enter a request into the table that has not decoded yet, or never will under compression."""
        prefix_end = self.cfg.layout.page_ceil(prompt_len)
        self.table.write_dense(RequestState(row, prefix_end, prefix_end, prefix_end, seq_len), stays_dense)

    def _enter(self, state: RequestState) -> None:
        """After every change: when to look at the request again, and its row of the table."""
        state.wakes_at = self.schedule.wakes_at(state)
        self.table.write(state)

    def plan(self, views: Iterable[View], allocator: PageAllocator, early: EarlyEvents = NO_EARLY_EVENTS) -> StepPlan:
        """Choose this step's events and move pages.

        views: running requests in batch order; early: events to run after those that are due.
        All allocations come before all frees: otherwise one request's source page could become another's
        target inside one launch. A condense event that the pool cannot serve is postponed.
        """
        running, schedule = list(views), self.schedule
        awake = [view for view in running if view[1] >= view[0].wakes_at]
        due = [(state, seq_len) for state, seq_len in awake if seq_len >= state.observe_from]
        plan = StepPlan(observes=self._start_observing([*due, *early.observes]))
        for state, seq_len in awake:
            self._learn(state, seq_len)
        budget = self.cfg.options.max_events_per_step if early.hurry else schedule.event_budget(len(running))
        for state, seq_len in schedule.due(awake):
            if plan.num_events >= budget:
                break
            if schedule.condense_is_due(state, seq_len) and self._plan_condense(state, seq_len, allocator, plan):
                state.early_pages = 0
                continue
            if schedule.select_is_due(state, seq_len):
                plan.selects.append(self._plan_select(state, seq_len))
        for state, seq_len in early.events:
            if plan.num_events >= budget:
                break
            self._plan_early(state, seq_len, allocator, plan)
        for op in plan.condenses:
            self._free_sources(op, allocator, plan)
        return plan

    def _learn(self, state: RequestState, seq_len: int) -> None:
        """Count survivors in the step in which they may first be used, not in the one in which they arrive: that
        one depends on the overlap scheduler."""
        settled_from = self.schedule.settled_from(state)
        if not state.is_unread or seq_len < settled_from:
            return
        if seq_len == settled_from and state.survivor_pages is not None:
            self.kept.add(state.survivor_pages * self.cfg.layout.page_size, state.recent_start - state.prefix_end)
        state.is_unread = False
        self._enter(state)

    def _plan_early(self, state: RequestState, seq_len: int, allocator: PageAllocator, plan: StepPlan) -> None:
        gain = self.schedule.condense_gain(state) if self.schedule.is_settled(state, seq_len) else 0
        if gain <= 0:
            plan.selects.append(self._plan_select(state, seq_len))
            plan.early += 1
        elif self._plan_condense(state, seq_len, allocator, plan):
            state.early_pages += gain
            plan.early += 1

    def _start_observing(self, views: Iterable[View]) -> list[ObserveOp]:
        """Give ring slots to requests that have none, as long as there are any; the others wait for one."""
        ops = []
        for state, seq_len in views:
            if state.ring_slot is None and self.free_ring_slots:
                state.ring_slot, state.observe_from = self.free_ring_slots.pop(), seq_len
                ops.append(ObserveOp(state.row, state.ring_slot))
                self._enter(state)
        return ops

    def forget(self, state: RequestState) -> None:
        """Take back what a request has here that ends or holds nothing."""
        self.table.clear(state.row)
        self._stop_observing(state)

    def _stop_observing(self, state: RequestState) -> None:
        if state.ring_slot is not None:
            self.free_ring_slots.append(state.ring_slot)
            state.ring_slot = None

    def _plan_select(self, state: RequestState, seq_len: int) -> SelectOp:
        old_recent_start = state.recent_start
        state.recent_start = self.schedule.select_target(state, seq_len)
        first_query = max(state.observe_from, seq_len - self.query_window)
        options = self.cfg.options
        # a request's first event starts from the priors if there are any
        has_temperature = state.num_selects > 0 or options.priors is not None
        recalibrate = not has_temperature or (
            state.num_selects > 0 and state.num_selects % options.recalibrate_every == 0
        )
        state.num_selects += 1
        state.selected_at = seq_len
        state.survivor_pages = None
        ring_slot = state.ring_slot
        assert ring_slot is not None
        remembered_end, state.measured_end = state.measured_end, self._measured_end(state, first_query)
        self._stop_observing(state)
        # queries before this event attended another set of tokens than the next event will assume
        state.observe_from = self.schedule.observe_from(state, seq_len)
        self._enter(state)
        return SelectOp(
            state=state,
            row=state.row,
            prefix_end=state.prefix_end,
            condensed_end=state.condensed_end,
            old_recent_start=old_recent_start,
            recent_start=state.recent_start,
            first_query=first_query,
            seq_len=seq_len,
            condensed_list_bound=state.condensed_list_bound,
            recalibrate=recalibrate,
            ring_slot=ring_slot,
            remembered_end=remembered_end,
            measured_end=state.measured_end,
        )

    def _measured_end(self, state: RequestState, first_query: int) -> int:
        """End of the positions that a select event measures where events remember.

        Tokens of the recent window count as soon as every observed query is `query_window` tokens younger: attention
        to the last few tokens says little about what they are worth later.
        """
        if not self.cfg.remembers:
            return 0
        settled = min(first_query - self.query_window, state.condensed_end + self.cfg.remembered_span)
        return max(state.recent_start, self.cfg.layout.page_floor(settled))

    def _plan_condense(self, state: RequestState, seq_len: int, allocator: PageAllocator, plan: StepPlan) -> bool:
        assert state.survivor_pages is not None
        slots = allocator.alloc_pages(state.survivor_pages)
        if slots is None:
            plan.postponed += 1
            return False
        plan.allocated_pages += state.survivor_pages
        plan.condenses.append(CondenseOp(state, state.row, slots, start=state.condensed_end, end=state.recent_start))
        state.condensed_end = state.recent_start
        # queries before this event attended another set of tokens than the next select event will assume
        is_recording = state.ring_slot is not None
        state.observe_from = seq_len if is_recording else self.schedule.observe_from(state, seq_len)
        return True

    def _free_sources(self, op: CondenseOp, allocator: PageAllocator, plan: StepPlan) -> None:
        state = op.state
        if state.num_condensed_pages:
            allocator.free_pages(state.condensed_slots)
        allocator.free_row(op.row, op.start, op.end)
        plan.freed_pages += state.num_condensed_pages + (op.end - op.start) // self.cfg.layout.page_size
        assert state.survivor_pages is not None
        state.condensed_slots = op.slots
        state.num_condensed_pages = state.survivor_pages
        state.condensed_list_bound = state.longest_list
        state.survivor_pages = None
        state.num_condenses += 1
        self._enter(state)

    def settle(self, state: RequestState, head_pages: int, counts: list[int]) -> None:
        """Take over a select event's counts.

        head_pages: head pages that the survivors need, the maximum over the tensor-parallel ranks;
        counts: kept tokens per (layer, KV head) of this rank.
        """
        state.survivor_pages = -(-head_pages // self.cfg.layout.columns)
        state.longest_list = max(counts)
        state.kept_counts = counts
        state.is_unread = True
        self._enter(state)

    def release(self, state: RequestState, allocated_len: int, allocator: PageAllocator) -> int:
        """Free everything that compression made the request own.

        allocated_len: positions with an allocated slot. Returns the length that SGLang still has to release
        itself: the dense prefix if any event ran, else all of it.
        """
        state.released = True
        self.forget(state)
        if not state.is_compressed:
            return allocated_len
        if state.num_condensed_pages:
            allocator.free_pages(state.condensed_slots)
        allocator.free_row(state.row, state.condensed_end, allocated_len)
        return state.prefix_end
