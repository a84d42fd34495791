"""SGLang's scheduler in small, host only: waiting queue, prefill, decode, retraction, with the real planner, relief
and admission on top of a pool that proves page ownership."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from lifecycle.page_pool import PAGE, PagePool

from hardkv_sglang.config import HardKVConfig
from hardkv_sglang.engine.admission import Admission
from hardkv_sglang.lifecycle.planner import LifecyclePlanner
from hardkv_sglang.lifecycle.relief import PressureRelief
from hardkv_sglang.lifecycle.request_state import RequestState, View
from hardkv_sglang.lifecycle.step_plan import SelectOp
from hardkv_sglang.memory_pool.layout import PoolLayout
from hardkv_sglang.memory_pool.resolved_config import ResolvedConfig
from hardkv_sglang.observability.statistics import Statistics

KeptTokens = Callable[[random.Random, int], int]
"""Tokens that a list of so many aged tokens keeps."""


@dataclass(eq=False)
class Request:
    """A request with the fields of SGLang's `Req` that admission reads."""

    rid: str
    num_prompt: int
    num_output: int
    max_new_tokens: int
    ignore_eos: bool
    num_decoded: int = 0
    retractions: int = 0
    prefix_indices: tuple[int, ...] = ()
    req_pool_idx: int = 0
    kv_committed_len: int = 0
    custom_params: dict[str, str] | None = None

    @property
    def origin_input_ids(self) -> range:
        return range(self.num_prompt)

    @property
    def output_ids(self) -> range:
        return range(self.num_decoded)

    @property
    def sampling_params(self) -> Request:
        return self


@dataclass
class Serving:
    """One server; a step is one decode step or one prefill."""

    options: HardKVConfig
    num_pages: int
    waiting: list[Request]
    kept_tokens: KeptTokens
    max_running: int = 256
    seed: int = 0
    is_checked: bool = False  # prove every invariant at every step
    running: list[Request] = field(default_factory=list)
    states: dict[Request, RequestState] = field(default_factory=dict)
    statistics: Statistics = field(default_factory=Statistics)
    decode_steps: int = 0
    sum_running: int = 0
    min_free: int = 1 << 30
    condenses_after_retraction: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        layout = PoolLayout(2, 2, 64, PAGE, PAGE * (self.num_pages + 1), survivor_bits=self.options.survivor_bits)
        self.random = random.Random(self.seed)
        self.pool = PagePool(self.num_pages)
        self.planner = LifecyclePlanner(ResolvedConfig(self.options, layout, 4, 0.125, self.max_running + 1, 1 << 16))
        self.relief = PressureRelief(self.planner)
        self.admission = Admission(self.planner, self.relief, self.states)
        self.is_full = False
        self.in_flight: list[list[SelectOp]] = [[], []]  # counts of the last two steps
        self.rows = list(range(1, self.max_running + 1))

    def run(self) -> None:
        while self.waiting or self.running:
            if not self.prefill():
                self.decode()

    def prefill(self) -> bool:
        admitted: list[Request] = []
        admission = self.admission.open(self.running)
        while not self.is_full and self.waiting and len(self.running) + len(admitted) < self.max_running:
            req = self.waiting[0]
            taken = sum(-(-(r.num_prompt + r.num_decoded) // PAGE) + 1 for r in [*admitted, req])
            fits = admission.fits(len(self.pool.free) * PAGE, admitted, req)
            if not fits or taken > len(self.pool.free):
                self.is_full = True
                break
            admitted.append(self.waiting.pop(0))
        self.start(admitted)
        return bool(admitted)

    def force(self, reqs: list[Request]) -> None:
        """Start requests whether admission would or not."""
        self.start(list(reqs))

    def start(self, reqs: list[Request]) -> None:
        for req in reqs:
            req.req_pool_idx, req.kv_committed_len = self.rows.pop(), req.num_prompt + req.num_decoded
            for seq_len in range(1, req.kv_committed_len + 1):
                assert self.pool.extend_row(req.req_pool_idx, seq_len)
            req.num_decoded += 1
        self.running += reqs

    def pages_needed(self, reqs: list[Request]) -> int:
        return sum(r.kv_committed_len % PAGE == 0 for r in reqs)

    def decode(self) -> None:
        for req in [r for r in self.running if r.num_decoded >= r.num_output]:
            self.running.remove(req)
            self.admission.output_length.add_end()
            self.release(req)
        if not self.running:
            return
        if self.pages_needed(self.running) > len(self.pool.free):
            self.retract()
        self.min_free = min(self.min_free, len(self.pool.free))
        self.plan()
        for req in self.running:
            req.kv_committed_len += 1
            req.num_decoded += 1
            assert self.pool.extend_row(req.req_pool_idx, req.kv_committed_len)
        self.decode_steps += 1
        self.sum_running += len(self.running)

    def retract(self) -> None:
        order = sorted(self.running, key=lambda r: (r.num_decoded, -r.num_prompt), reverse=True)
        while True:
            req = order.pop()
            self.running.remove(req)
            self.release(req)
            req.retractions += 1
            self.waiting.append(req)
            if self.pages_needed(self.running) <= len(self.pool.free):
                return

    def release(self, req: Request) -> None:
        row, left = req.req_pool_idx, req.kv_committed_len
        state = self.states.pop(req, None)
        self.admission.roster.forget(req)
        if state is not None:
            left = self.planner.release(state, left, self.pool)
        self.pool.free_row(row, 0, left)
        del self.pool.rows[row]
        self.rows.append(row)
        self.is_full = False

    def plan(self) -> None:
        for op in self.in_flight.pop(0):
            if not op.state.released:
                self.settle(op.state)
        for req in self.running:
            if req not in self.states and req.custom_params is None:
                self.states[req] = self.planner.admit(
                    req.req_pool_idx, req.num_prompt, req.num_prompt // PAGE * PAGE, req.kv_committed_len
                )
        views = [(self.states[r], r.kv_committed_len) for r in self.running if r in self.states]
        seq_lens, free = [r.kv_committed_len for r in self.running], len(self.pool.free)
        self.statistics.count_rescue(self.relief.is_rescue(seq_lens, free))
        self.pool.log.clear()
        if self.is_checked:
            self.check_sleepers(views)
        plan = self.planner.plan(views, self.pool, self.relief.choose(views, seq_lens, free))
        if self.is_checked:
            assert plan.num_events <= self.options.max_events_per_step
            self.check(views)
        for req in self.running:
            state = self.states.get(req)
            if req.retractions and any(op.state is state for op in plan.condenses):
                self.condenses_after_retraction[req.rid] = self.condenses_after_retraction.get(req.rid, 0) + 1
        self.admission.output_length.add_tokens(len(self.running))
        self.statistics.count_plan(plan)
        self.in_flight.append(plan.selects)
        self.is_full &= not plan.freed_pages

    def check_sleepers(self, views: list[View]) -> None:
        """The table is up to date, and whoever the planner does not look at in this step has nothing to do."""
        schedule, table = self.planner.schedule, self.planner.table
        for state, seq_len in views:
            assert tuple(table.columns[:, state.row]) == table.tiers(state)
            if seq_len < state.wakes_at:
                assert schedule.overdue(state, seq_len) < 0
                assert state.ring_slot is not None or seq_len < state.observe_from
                assert not state.is_unread or not schedule.is_settled(state, seq_len)

    def settle(self, state: RequestState) -> None:
        aged = state.recent_start - state.prefix_end
        most = self.options.max_tokens or aged
        candidates = min(most, state.condensed_list_bound + state.sparse_span)
        counts = [min(candidates, self.kept_tokens(self.random, aged)) for _ in range(4)]
        per_page = self.planner.cfg.layout.head_page_tokens
        self.planner.settle(state, sum(-(-n // per_page) for n in counts), counts)

    def check(self, views: list[View]) -> None:
        if "free" in self.pool.log:
            assert "alloc" not in self.pool.log[self.pool.log.index("free") :]
        for state, seq_len in views:
            assert state.prefix_end <= state.condensed_end <= state.recent_start
            assert state.sparse_span <= self.planner.cfg.max_sparse_span
            assert state.num_condensed_pages <= self.planner.cfg.max_condensed_pages
            assert not state.is_compressed or state.recent_start + self.options.recent_tokens <= seq_len
        self.pool.check([state for state, _ in views], self.num_pages)
