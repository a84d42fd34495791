"""One rank's compression state, and what it does at each seam of the scheduler. Hooks only forward to it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from hardkv_sglang.engine import compat
from hardkv_sglang.engine.admission import Admission
from hardkv_sglang.engine.audit import Audit
from hardkv_sglang.engine.backends import TieredBackend
from hardkv_sglang.engine.overrides import is_opted_out
from hardkv_sglang.engine.preemption import Preemption
from hardkv_sglang.engine.request import Request
from hardkv_sglang.events.executor import EventExecutor, SelectReport, SettledCounts
from hardkv_sglang.kernels.footprint import Footprint
from hardkv_sglang.lifecycle.planner import LifecyclePlanner
from hardkv_sglang.lifecycle.prefix_groups import PrefixGrouper
from hardkv_sglang.lifecycle.relief import PressureRelief
from hardkv_sglang.lifecycle.request_state import RequestState
from hardkv_sglang.lifecycle.step_plan import StepPlan
from hardkv_sglang.memory_pool.integrity import IntegrityError
from hardkv_sglang.memory_pool.resolved_config import ResolvedConfig
from hardkv_sglang.observability.occupancy import Occupancy
from hardkv_sglang.observability.statistics import RequestReport, Statistics

if TYPE_CHECKING:
    from hardkv_sglang.observability.metrics import HardKVMetrics


logger = logging.getLogger(__name__)


class HardKVRuntime:
    """Made by `assembly.build_runtime` once the model and its pool exist. Owned by the scheduler thread."""

    def __init__(self, executor: EventExecutor, backend: TieredBackend) -> None:
        self.executor = executor
        self.backend = backend
        self.cfg: ResolvedConfig = executor.memory.cfg
        # by SGLang's request object, running requests that decode under HARD-KV: clients choose ids, and two that run
        # at once may have the same
        self.states: dict[Request, RequestState] = {}
        self.planner = LifecyclePlanner(self.cfg)
        self.prefixes = PrefixGrouper(self.cfg.min_shared_tokens, self.cfg.layout.num_slots)
        self.relief = PressureRelief(self.planner)
        self.admission = Admission(self.planner, self.relief, self.states)
        self.preemption = Preemption(self.admission, self.states, self.cfg.layout.page_size)
        self.audit = Audit(executor.memory, self.states, executor.tp_group is not None)
        self.statistics = Statistics.keeping(self.cfg.options.request_reports)
        self.pending: list[StepPlan] = []  # planned by the scheduler, not yet launched
        self.idle_check_due = False  # something ran since the last check of an idle server
        self.metrics: HardKVMetrics | None = None  # None on a rank that reports no Prometheus metrics

    def plan_decode(self, batch: Any) -> None:
        """Plan this step's events and move pages, before SGLang allocates the step's slots."""
        allocator = self._allocator(batch.tree_cache)
        views, seq_lens = [], compat.committed_lens(batch.reqs)
        for req, seq_len in zip(batch.reqs, seq_lens, strict=True):
            state = self.states.get(req)
            if state is None:
                if is_opted_out(compat.custom_params(req)):
                    continue
                state = self._admit(req)
            if not req.finished():
                state.seq_len = seq_len
                views.append((state, seq_len))
        self.idle_check_due = True
        available = allocator.available_pages()
        self.statistics.count_rescue(self.relief.is_rescue(seq_lens, available))
        with self.statistics.event_time():
            plan = self.planner.plan(views, allocator, self.relief.choose(views, seq_lens, available))
        self.admission.output_length.add_tokens(len(batch.reqs))
        self.statistics.count_plan(plan)
        if plan.freed_pages:
            # admission sleeps while the batch is full, and only a finished request would wake it
            batch.batch_is_full = False
        if not plan.is_empty:
            self.pending.append(plan)

    def _admit(self, req: Request) -> RequestState:
        state = self.planner.admit(
            row=compat.row_of(req),
            prompt_len=len(req.origin_input_ids),
            protected_len=compat.protected_len(req),
            seq_len=compat.committed_len(req),
        )
        self.states[req] = state
        return state

    def launch(self, batch: Any) -> list[SelectReport]:
        """Run what is planned, on the forward stream, before the batch's own forward."""
        reports = self._launch_events()
        if batch.forward_mode.is_extend():
            self.executor.reset(batch.req_pool_indices)
            self.backend.forget_lists(compat.row_of(req) for req in batch.reqs)
        else:
            self.backend.set_aged_tokens(torch.tensor([self._aged_tokens(r) for r in batch.reqs], dtype=torch.int32))
            nodes = [compat.prefix_node(req) for req in batch.reqs]
            self.backend.set_prefix_groups(
                self.prefixes.group(nodes, lambda: compat.prefix_paths(batch.reqs, batch.tree_cache))
            )
        return reports

    def _launch_events(self) -> list[SelectReport]:
        plans, self.pending = self.pending, []
        if not plans:
            return []
        with self.statistics.event_time():
            reports = [report for plan in plans for report in self.executor.run(plan)]
        for plan in plans:
            self.backend.forget_lists(plan.rows)
        return reports

    def _aged_tokens(self, req: Request) -> int:
        state = self.states.get(req)
        return state.recent_start - state.prefix_end if state is not None and state.is_compressed else 0

    def settle(self, reports: list[SelectReport]) -> None:
        """Take over the counts of select events whose step has been waited for."""
        for report in reports:
            state = report.op.state
            if state.released:
                continue
            counts = SettledCounts.read(report)
            self.planner.settle(state, counts.head_pages, counts.kept_tokens)
            # page-derived, so that admission decides the same on every rank
            kept = counts.head_pages * self.cfg.layout.head_page_tokens / self.cfg.layout.columns
            span = report.op.recent_start - report.op.condensed_end
            candidates = span + state.num_condensed_pages * self.cfg.layout.head_page_tokens
            self.statistics.count_selection(candidates, kept, counts.kept_mass, counts.infeasible_lists)

    def release(self, req: Request, tree_cache: Any) -> None:
        """Before SGLang releases a request: free what compression owns, leave only exact KV to SGLang."""
        state = self.states.pop(req, None)
        self.admission.roster.forget(req)
        if req.finished():
            self.admission.output_length.add_end()
        if state is None:
            return
        if not compat.holds_kv(req):
            self.planner.forget(state)
            return
        allocated = compat.allocated_len(req)
        if state.is_compressed and req.finished():
            num_tokens, num_prompt = compat.settled_len(req), len(req.origin_input_ids)
            self.statistics.count_end(
                RequestReport.of(req.rid, state, num_tokens, num_prompt, self.cfg.layout.page_size)
            )
        left = self.planner.release(state, allocated, self._allocator(tree_cache))
        if left != allocated:
            compat.truncate_kv(req, left)

    def uncached_tokens(self, reqs: list[Request]) -> int:
        """Pool tokens that these requests hold less than their lengths say (negative: more)."""
        states = [self.states[req] for req in reqs if req in self.states]
        return sum(state.freed_tokens(self.cfg.layout.page_size) for state in states)

    def check_idle(self, tree_cache: Any) -> None:
        """Look after a server without requests, once after each busy period: SGLang polls while idle.

        With SGLang's strict memory checks, prove that every page has one owner; raises `IntegrityError`. Without them,
        as in production, nothing is read from the device: what requests have left behind is logged and dropped, and
        whether pages are missing is for SGLang's own count to say, which has just passed.
        """
        if not self.idle_check_due:
            return
        self.idle_check_due = False
        problem = self._leftovers()
        if compat.checks_every_step():
            if problem is not None:
                raise IntegrityError(problem)
            self.check_integrity([], tree_cache)
        elif problem is not None:
            logger.error("HARD-KV: %s; please report this", problem)
            for state in self.states.values():
                self.planner.forget(state)
            self.states.clear()
            self.admission.roster.clear()
        self.publish_metrics()

    def _leftovers(self) -> str | None:
        if self.states:
            return f"the idle server holds compression state of rows {[s.row for s in self.states.values()]}"
        if len(self.admission.roster):
            return "the idle server expects more tokens of requests that have ended"
        if len(self.planner.free_ring_slots) != self.cfg.num_ring_slots:
            return "the idle server records queries of requests that have ended"
        return None

    def check_integrity(self, reqs: list[Request], tree_cache: Any) -> None:
        """See `Audit.check`."""
        self.audit.check(reqs, tree_cache)

    def start_metrics(self, labels: Mapping[str, Any]) -> None:
        """Export Prometheus series with these labels from now on."""
        from hardkv_sglang.observability.metrics import HardKVMetrics

        self.metrics = HardKVMetrics(labels)

    def publish_metrics(self) -> None:
        """Bring the Prometheus series up to date, on a rank that has them."""
        if self.metrics is not None:
            self.metrics.publish(self.statistics, self.occupancy())

    def occupancy(self) -> Occupancy:
        """What the running requests hold."""
        return Occupancy.of(self.states.values(), self.cfg.layout.page_size)

    def describe(self) -> dict[str, Any]:
        """State for `/server_info`."""
        layout, itemsize = self.cfg.layout, self.executor.memory.k_storage.element_size()
        return {
            "options": self.cfg.options.to_dict(),
            "page_bytes": 2 * layout.columns * layout.page_size * layout.head_dim * itemsize,
            "table_bytes": self.footprint.total,
            "running": self.occupancy().to_dict(),
            "shared_prefixes": self.prefixes.describe(),
            **self.statistics.to_dict(),
        }

    @property
    def footprint(self) -> Footprint:
        """Device memory beside the pool, as allocated."""
        tables = self.executor.memory.tables
        rings = tables.query_ring.nbytes + tables.lse2_ring.nbytes
        return Footprint(tables.num_bytes - rings, rings, self.backend.workspace_bytes)

    def _allocator(self, tree_cache: Any) -> compat.SglangPageAllocator:
        req_to_token = self.executor.memory.req_to_token
        return compat.SglangPageAllocator(tree_cache, tree_cache.token_to_kv_pool_allocator, req_to_token)
