"""Which tokens of a request are in which tier, and when they move: host bookkeeping only.

A request's tokens, as half-open position ranges; every bound but the last is a multiple of the page size:

    range                  tier       dense slots   freed by
    [0, prefix_end)        dense      live          the radix tree, which owns and shares the prompt's pages
    [prefix_end,
     condensed_end)        condensed  freed         (survivors sit in the request's condensed pages)
    [condensed_end,
     recent_start)         sparse     live          condense event, or release
    [recent_start, len)    recent     live          release

Decisions depend on token counts and on page counts that are equal on every tensor-parallel rank, so that all
ranks take the same ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import ceil
from typing import Any, Protocol

from hardkv_sglang.config import ResolvedConfig

COUNT_DELAY = 2  # steps until a select event's counts are on the host, with or without the overlap scheduler


class PageAllocator(Protocol):
    """What planning needs of SGLang's allocator. Slots are opaque device tensors here."""

    def alloc_pages(self, num_pages: int) -> Any | None:
        """Slots of `num_pages` fresh token pages, or None when the pool cannot give them."""

    def free_pages(self, slots: Any) -> None:
        """Return whole token pages."""

    def free_row(self, row: int, start: int, end: int) -> None:
        """Return the token pages behind positions `[start, end)` of a row; `start` is a page boundary."""


@dataclass
class RequestState:
    """Tiers of one running request. Owned by the scheduler thread."""

    row: int
    prefix_end: int
    condensed_end: int
    recent_start: int
    decode_start: int  # position of the first decoded token: queries before it were never observed
    observe_from: int  # first position whose query is recorded for the next select event
    condensed_slots: Any = None
    num_condensed_pages: int = 0
    num_selects: int = 0
    num_condenses: int = 0
    selected_at: int = 0  # sequence length at the last select event
    survivor_pages: int | None = None  # token pages that the selected survivors need; None while unknown
    longest_list: int = 0  # tokens in the longest condensed list after the next condense event
    condensed_list_bound: int = 0  # tokens in the longest condensed list now
    released: bool = False
    seq_len: int = 0  # tokens with KV at the last planned step
    kept_counts: list[int] = field(default_factory=list)  # per (layer, KV head), from the last select event

    @property
    def is_compressed(self) -> bool:
        """Whether any event ran: from then on new KV is approximate and must not enter the radix tree."""
        return self.num_selects > 0

    @property
    def sparse_span(self) -> int:
        """Positions in the sparse tier, kept or not."""
        return self.recent_start - self.condensed_end


@dataclass(frozen=True)
class ObserveOp:
    """Start recording queries of a row at a position."""

    row: int
    observe_from: int


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
    observe_from: int


@dataclass(frozen=True)
class CondenseOp:
    """Copy the selected survivors into `slots` and forget the dense slots of `[start, end)`."""

    state: RequestState
    row: int
    slots: Any
    start: int
    end: int


@dataclass
class StepPlan:
    """Device work of one decode step, in the order in which it runs."""

    observes: list[ObserveOp] = field(default_factory=list)
    condenses: list[CondenseOp] = field(default_factory=list)
    selects: list[SelectOp] = field(default_factory=list)
    freed_pages: int = 0
    allocated_pages: int = 0
    postponed: int = 0  # condense events that the pool could not serve

    @property
    def is_empty(self) -> bool:
        """Whether the step runs no device work of ours."""
        return not (self.observes or self.condenses or self.selects)


class LifecyclePlanner:
    """Plans the events of each decode step."""

    def __init__(self, cfg: ResolvedConfig) -> None:
        self.cfg = cfg
        options, layout = cfg.options, cfg.layout
        self.recent_tokens = options.recent_tokens
        self.query_window = options.query_window
        self.select_span = layout.page_ceil(options.select_interval)
        self.condense_span = layout.page_ceil(options.condense_interval)

    def admit(self, row: int, prompt_len: int, protected_len: int, seq_len: int) -> RequestState:
        """State of a request at its first decode step (again after a retraction).

        prompt_len: tokens of the prompt; protected_len: tokens that the radix tree owns; seq_len: tokens with KV.
        """
        prefix_end = self.cfg.layout.page_ceil(max(prompt_len, protected_len))
        state = RequestState(row, prefix_end, prefix_end, prefix_end, seq_len, 0)
        state.observe_from = max(seq_len, self._next_select(state) - self.query_window)
        return state

    def plan(self, views: Iterable[tuple[RequestState, int]], allocator: PageAllocator) -> StepPlan:
        """Choose this step's events and move pages.

        views: running requests as (state, tokens with KV written or in flight), in batch order.
        All allocations come before all frees: otherwise one request's source page could become another's
        target inside one launch. A condense event that the pool cannot serve is postponed.
        """
        plan = StepPlan()
        overdue = [(self._overdue(state, seq_len), state, seq_len) for state, seq_len in views]
        due = sorted((entry for entry in overdue if entry[0] >= 0), key=lambda entry: -entry[0])
        budget = self._event_budget(len(overdue))
        for _, state, seq_len in due:
            if len(plan.selects) + len(plan.condenses) >= budget:
                break
            if self._condense_is_due(state, seq_len) and self._plan_condense(state, seq_len, allocator, plan):
                continue
            if self._select_is_due(state, seq_len):
                plan.selects.append(self._plan_select(state, seq_len))
        for op in plan.condenses:
            self._free_sources(op, allocator, plan)
        return plan

    def _event_budget(self, num_requests: int) -> int:
        """Requests that may have an event in this step.

        Half as many again as the steady state needs: requests that started together then spread out by themselves,
        instead of making one step in every interval wait for all their events.
        """
        per_token = 1 / self.select_span + 1 / self.condense_span
        return min(self.cfg.options.max_events_per_step, ceil(1.5 * num_requests * per_token))

    def _next_select(self, state: RequestState) -> int:
        return state.recent_start + self.select_span + self.recent_tokens

    def _select_target(self, state: RequestState, seq_len: int) -> int:
        aged = self.cfg.layout.page_floor(seq_len - self.recent_tokens)
        return min(aged, state.condensed_end + self.cfg.max_sparse_span)

    def _condense_is_due(self, state: RequestState, seq_len: int) -> bool:
        settled = state.survivor_pages is not None and seq_len >= state.selected_at + COUNT_DELAY
        return settled and state.sparse_span >= self.condense_span

    def _overdue(self, state: RequestState, seq_len: int) -> int:
        """Tokens since the next event of this request was due; negative when none is."""
        if self._condense_is_due(state, seq_len):
            return seq_len - state.selected_at
        return seq_len - self._next_select(state) if self._select_is_due(state, seq_len) else -1

    def _select_is_due(self, state: RequestState, seq_len: int) -> bool:
        has_room = self._select_target(state, seq_len) - state.recent_start >= self.select_span
        return has_room and seq_len - state.observe_from >= self.query_window

    def _plan_select(self, state: RequestState, seq_len: int) -> SelectOp:
        old_recent_start = state.recent_start
        state.recent_start = self._select_target(state, seq_len)
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
        # queries before this event attended another set of tokens than the next event will assume
        state.observe_from = max(seq_len, self._next_select(state) - self.query_window)
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
            observe_from=state.observe_from,
        )

    def _plan_condense(self, state: RequestState, seq_len: int, allocator: PageAllocator, plan: StepPlan) -> bool:
        assert state.survivor_pages is not None
        slots = allocator.alloc_pages(state.survivor_pages)
        if slots is None:
            plan.postponed += 1
            return False
        plan.allocated_pages += state.survivor_pages
        state.observe_from = max(seq_len, state.observe_from)
        plan.condenses.append(CondenseOp(state, state.row, slots, start=state.condensed_end, end=state.recent_start))
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
        state.condensed_end = op.end
        state.survivor_pages = None
        state.num_condenses += 1

    def settle(self, state: RequestState, head_pages: int, counts: list[int]) -> None:
        """Take over a select event's counts.

        head_pages: head pages that the survivors need, the maximum over the tensor-parallel ranks;
        counts: kept tokens per (layer, KV head) of this rank.
        """
        state.survivor_pages = -(-head_pages // self.cfg.layout.columns)
        state.longest_list = max(counts)
        state.kept_counts = counts

    def release(self, state: RequestState, allocated_len: int, allocator: PageAllocator) -> int:
        """Free everything that compression made the request own.

        allocated_len: positions with an allocated slot. Returns the length that SGLang still has to release
        itself: the dense prefix if any event ran, else all of it.
        """
        state.released = True
        if not state.is_compressed:
            return allocated_len
        if state.num_condensed_pages:
            allocator.free_pages(state.condensed_slots)
        allocator.free_row(state.row, state.condensed_end, allocated_len)
        return state.prefix_end
