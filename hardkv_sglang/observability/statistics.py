"""What compression did: counters of the server and reports of finished requests."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from statistics import mean, quantiles
from time import perf_counter
from typing import Any

from hardkv_sglang.lifecycle.request_state import RequestState
from hardkv_sglang.lifecycle.step_plan import StepPlan

MOST_RID = 64  # characters of a request id in a report: clients choose their lengths
HIDDEN = ("reports", "finished", "kept_mass_sum", "is_rescued")  # fields that /server_info derives others from


@dataclass(frozen=True)
class RequestReport:
    """One finished request, in tokens and token pages."""

    rid: str
    num_tokens: int
    decoded_tokens: int
    select_events: int  # since its last prefill: a retraction starts anew
    condense_events: int
    dense_pages: int  # token pages that the request would hold uncompressed
    held_pages: int  # token pages that it held when it finished
    kept_mean: float  # kept tokens per (layer, KV head) at the last select event
    kept_p10: float
    kept_p90: float
    kept_max: int

    @classmethod
    def of(
        cls, rid: str, state: RequestState, num_tokens: int, num_prompt_tokens: int, page_size: int
    ) -> RequestReport:
        """Report of a request with `num_tokens` tokens of KV, just before its release."""
        dense_pages = -(-num_tokens // page_size)
        freed = (state.condensed_end - state.prefix_end) // page_size
        kept = state.kept_counts or [0]
        deciles = quantiles(kept, n=10, method="inclusive") if len(kept) > 1 else [float(kept[0])] * 9
        return cls(
            rid=rid[:MOST_RID],
            num_tokens=num_tokens,
            decoded_tokens=num_tokens - num_prompt_tokens,
            select_events=state.num_selects,
            condense_events=state.num_condenses,
            dense_pages=dense_pages,
            held_pages=dense_pages - freed + state.num_condensed_pages,
            kept_mean=mean(kept),
            kept_p10=deciles[0],
            kept_p90=deciles[8],
            kept_max=max(kept),
        )


@dataclass
class FinishedTotals:
    """Sums over all requests that ended compressed: what everybody may see of them."""

    requests: int = 0
    num_tokens: int = 0
    decoded_tokens: int = 0
    dense_pages: int = 0
    held_pages: int = 0

    def add(self, report: RequestReport) -> None:
        """Add one request."""
        self.requests += 1
        self.num_tokens += report.num_tokens
        self.decoded_tokens += report.decoded_tokens
        self.dense_pages += report.dense_pages
        self.held_pages += report.held_pages


@dataclass
class Statistics:
    """Counters since start. Owned by the scheduler thread."""

    select_events: int = 0
    condense_events: int = 0
    postponed_events: int = 0
    early_events: int = 0  # events that ran before they were due, because the pool was low
    retractions_avoided: int = 0  # times that only pages freed by early events made the next decode step fit
    freed_pages: int = 0
    allocated_pages: int = 0
    candidate_tokens: int = 0  # tokens that select events could keep, per (layer, KV head)
    kept_tokens: float = 0.0  # tokens that they kept, mean over (layer, KV head)
    settled_events: int = 0  # select events whose counts are known
    kept_mass_sum: float = 0.0  # over settled events, mean over lists
    infeasible_lists: int = 0  # lists for which no temperature reaches the target
    event_seconds: float = 0.0  # host time of planning and launching events
    is_rescued: bool = False  # whether the last step fitted only because of early events
    finished: FinishedTotals = field(default_factory=FinishedTotals)
    reports: deque[RequestReport] = field(default_factory=lambda: deque(maxlen=0))

    @classmethod
    def keeping(cls, num_reports: int) -> Statistics:
        """Counters at zero that will keep the reports of so many finished requests."""
        return cls(reports=deque(maxlen=num_reports))

    def count_plan(self, plan: StepPlan) -> None:
        """Add one step's events."""
        self.select_events += len(plan.selects)
        self.condense_events += len(plan.condenses)
        self.postponed_events += plan.postponed
        self.early_events += plan.early
        self.freed_pages += plan.freed_pages
        self.allocated_pages += plan.allocated_pages

    def count_end(self, report: RequestReport) -> None:
        """Add a request that ends, not one that is retracted, after at least one event."""
        self.finished.add(report)
        self.reports.append(report)

    def count_rescue(self, is_rescue: bool) -> None:
        """Note whether this step fits only because of early events; a run of such steps counts once."""
        self.retractions_avoided += is_rescue and not self.is_rescued
        self.is_rescued = is_rescue

    def count_selection(
        self, candidate_tokens: int, kept_tokens: float, kept_mass: float, infeasible_lists: int
    ) -> None:
        """Add one settled select event."""
        self.settled_events += 1
        self.candidate_tokens += candidate_tokens
        self.kept_tokens += kept_tokens
        self.kept_mass_sum += kept_mass
        self.infeasible_lists += infeasible_lists

    @contextmanager
    def event_time(self) -> Iterator[None]:
        """Add the host time of the block to `event_seconds`."""
        start = perf_counter()
        yield
        self.event_seconds += perf_counter() - start

    @property
    def kept_mass(self) -> float:
        """Mean attention mass that survives a select event; 1 before the first one."""
        return self.kept_mass_sum / self.settled_events if self.settled_events else 1.0

    @property
    def kept_fraction(self) -> float:
        """Share of the scored tokens that select events kept; 1 before the first event."""
        return self.kept_tokens / self.candidate_tokens if self.candidate_tokens else 1.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable counters, and the reports that the operator asked for."""
        counters = {k: v for k, v in vars(self).items() if k not in HIDDEN}
        means = {"kept_fraction": self.kept_fraction, "kept_mass": self.kept_mass}
        return {**counters, **means, "finished": asdict(self.finished), "requests": [asdict(r) for r in self.reports]}
