"""Device work of the lifecycle: observe, select, condense, reset. Runs on the forward stream, before the step's
attention, and is the only writer of the tier tables."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hardkv_sglang.events.candidates import CandidateReader
from hardkv_sglang.events.operations import operations_for
from hardkv_sglang.events.scoring import make_scorer
from hardkv_sglang.lifecycle.request_state import RequestState
from hardkv_sglang.lifecycle.step_plan import CondenseOp, ObserveOp, SelectOp, StepPlan
from hardkv_sglang.memory_pool.layout import head_pages_needed
from hardkv_sglang.memory_pool.rank_memory import RankMemory
from hardkv_sglang.selection.policies import make_policy

MASS_UNITS = 1_000_000  # kept mass travels to the host as an integer beside the counts


@dataclass(frozen=True)
class SelectReport:
    """Counts of one select event, on their way to the host."""

    op: SelectOp
    counts: torch.Tensor  # [3 + L * H] int32, fields of `SettledCounts`


@dataclass(frozen=True)
class SettledCounts:
    """A select event's counts on the host."""

    head_pages: int  # that the survivors need, the maximum over the tensor-parallel ranks
    infeasible_lists: int  # whose calibration found no temperature
    kept_mass: float  # attention mass of always-kept plus kept tokens, mean over lists
    kept_tokens: list[int]  # per (layer, KV head) of this rank

    @classmethod
    def read(cls, report: SelectReport) -> SettledCounts:
        """Counts of a report whose step has been waited for."""
        head_pages, infeasible, mass, *kept = report.counts.tolist()
        return cls(head_pages, infeasible, mass / MASS_UNITS, kept)


class EventExecutor:
    """Runs step plans against one rank's pool and tables."""

    def __init__(
        self,
        memory: RankMemory,
        tp_group: torch.distributed.ProcessGroup | None,
        priors: torch.Tensor | None = None,
    ) -> None:
        self.memory = memory
        self.tp_group = tp_group
        self.priors = priors  # [L, H] float32
        self.operations = operations_for(memory)
        self.policy = make_policy(memory.cfg.options, memory.layout.head_page_tokens, self.operations.bound_counts)
        self.reader = CandidateReader(memory, self.policy)
        self.scorer = make_scorer(self.reader)

    def warm_up(self) -> None:
        """Run both kinds of events on the padding row, so that kernels are compiled and loaded before requests come.

        Every tensor-parallel rank must call it; leaves the row as it was.
        """
        page, row, device = self.memory.layout.page_size, 0, self.memory.req_to_token.device
        state = RequestState(row, 0, 0, 0, 0)
        select = SelectOp(
            state=state, row=row, prefix_end=0, condensed_end=0, old_recent_start=0, recent_start=page, first_query=0,
            seq_len=self.memory.cfg.options.query_window, condensed_list_bound=page, recalibrate=True, ring_slot=0,
        )  # fmt: skip
        padding_page = torch.arange(page, device=device)
        self._condense([CondenseOp(state=state, row=row, slots=padding_page, start=0, end=0)])
        self._select(select)
        self.reset(torch.tensor([row], device=device))

    def run(self, plan: StepPlan) -> list[SelectReport]:
        """Execute a plan; returns one report per select event, readable once the step's results are."""
        for observe in plan.observes:
            self._observe(observe)
        if plan.condenses:
            self._condense(plan.condenses)
        return [self._select(op) for op in plan.selects]

    def _observe(self, op: ObserveOp) -> None:
        # `fill_`: to assign a number to one element copies it from the host, which waits for the device
        self.memory.tables.ring_slot[op.row].fill_(op.ring_slot)

    def _condense(self, ops: list[CondenseOp]) -> None:
        self.operations.condense(self.memory, ops)
        for op in ops:
            # the freed slots may be someone else's from this step on: a stray reader must hit the padding page
            self.memory.req_to_token[op.row, op.start : op.end].fill_(0)

    def _select(self, op: SelectOp) -> SelectReport:
        layout = self.memory.layout
        temperature = None if op.recalibrate else self.memory.tables.temperature[:, op.row].flatten()
        selection = self.policy.choose(self.scorer.score(op), temperature)
        num_kept = self.operations.publish(self.memory.tables, op, selection.keep, selection.temperature)
        head_pages = head_pages_needed(num_kept, layout.head_page_tokens).sum(dtype=torch.int32).view(1)
        if self.tp_group is not None:
            torch.distributed.all_reduce(head_pages, torch.distributed.ReduceOp.MAX, group=self.tp_group)
        infeasible = selection.infeasible.sum(dtype=torch.int32).view(1)
        mass_units = (selection.kept_mass.mean() * MASS_UNITS).to(torch.int32).view(1)
        return SelectReport(op, self._to_host(torch.cat((head_pages, infeasible, mass_units, num_kept.flatten()))))

    def _to_host(self, counts: torch.Tensor) -> torch.Tensor:
        if not counts.is_cuda:
            return counts
        host = torch.empty(counts.shape, dtype=counts.dtype, device="cpu", pin_memory=True)
        return host.copy_(counts, non_blocking=True)

    def reset(self, rows: torch.Tensor) -> None:
        """Make rows ([N] int64) uncompressed: their request is (again) in prefill."""
        self.memory.tables.reset(rows)
        if self.priors is not None:
            self.memory.tables.temperature[:, rows] = self.priors[:, None]
