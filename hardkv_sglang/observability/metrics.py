"""Prometheus series on SGLang's `/metrics`: statistics as counters, occupancy as gauges.

Imported only where a scheduler reports metrics: SGLang runs Prometheus in multiprocess mode, which is decided by an
environment variable when `prometheus_client` is first imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge

from hardkv_sglang.generated import write_or_print
from hardkv_sglang.observability.occupancy import Occupancy
from hardkv_sglang.observability.statistics import Statistics


@dataclass(frozen=True)
class Series:
    """One exported number."""

    name: str
    unit: str
    source: str  # attribute of `Statistics` (counters) or `Occupancy` (gauges)
    doc: str


COUNTERS = (
    Series("hardkv_select_events_total", "events", "select_events", "select events planned"),
    Series("hardkv_condense_events_total", "events", "condense_events", "condense events planned, early ones included"),
    Series(
        "hardkv_early_events_total", "events", "early_events",
        "select and condense events that ran before they were due, because the pool was low",
    ),
    Series(
        "hardkv_postponed_events_total", "attempts", "postponed_events",
        "condense events that got no pages and wait for a later step; each further attempt counts",
    ),
    Series(
        "hardkv_retractions_avoided_total", "steps", "retractions_avoided",
        "decode steps in which early events freed the pages that a retraction would have",
    ),
    Series(
        "hardkv_freed_pages_total", "token pages", "freed_pages",
        "returned to the allocator by condense events: dense pages and previous condensed pages",
    ),
    Series(
        "hardkv_allocated_pages_total", "token pages", "allocated_pages",
        "taken from the allocator by condense events",
    ),
    Series(
        "hardkv_candidate_tokens_total", "tokens", "candidate_tokens",
        "that select events scored, per (layer, KV head)",
    ),
    Series(
        "hardkv_kept_tokens_total", "tokens", "kept_tokens",
        "of those, kept; mean over (layer, KV head), rounded up to pages of each list",
    ),
    Series(
        "hardkv_event_seconds_total", "seconds", "event_seconds",
        "host time of planning events, in every decode step, and of launching them; on a CPU, computing them",
    ),
)  # fmt: skip

GAUGES = (
    Series(
        "hardkv_kept_ratio", "ratio", "kept_ratio",
        "hardkv_output_pages / hardkv_dense_output_pages; 1 while nothing runs",
    ),
    Series("hardkv_output_pages", "token pages", "output_pages", "held by the output of running requests"),
    Series("hardkv_dense_output_pages", "token pages", "dense_output_pages", "that it would hold uncompressed"),
    Series("hardkv_condensed_pages", "token pages", "condensed_pages", "of the held ones, pages of survivors"),
    Series(
        "hardkv_condensed_tokens", "tokens", "condensed_tokens",
        "output of running requests in the condensed tier, dropped tokens included",
    ),
    Series(
        "hardkv_sparse_tokens", "tokens", "sparse_tokens",
        "output of running requests in the sparse tier, attended or not",
    ),
)  # fmt: skip


class HardKVMetrics:
    """This rank's series. Owned by the scheduler thread."""

    def __init__(self, labels: Mapping[str, Any], registry: CollectorRegistry = REGISTRY) -> None:
        """labels: those of SGLang's own scheduler metrics, so that both can be joined and aggregated alike."""
        names = list(labels)
        counters = {s.source: Counter(s.name, help_text(s), names, registry=registry) for s in COUNTERS}
        # the mode of SGLang's own gauges: ranks and replicas differ in their labels, so there is nothing to merge
        gauges = {
            s.source: Gauge(s.name, help_text(s), names, registry=registry, multiprocess_mode="mostrecent")
            for s in GAUGES
        }
        self._counters = {source: counter.labels(**labels) for source, counter in counters.items()}
        self._gauges = {source: gauge.labels(**labels) for source, gauge in gauges.items()}
        self._published = dict.fromkeys(self._counters, 0.0)

    def publish(self, statistics: Statistics, occupancy: Occupancy) -> None:
        """Bring the series up to date. Statistics only grow: a counter gets what was added since the last call."""
        for source, counter in self._counters.items():
            value = getattr(statistics, source)
            counter.inc(value - self._published[source])
            self._published[source] = value
        for source, gauge in self._gauges.items():
            gauge.set(getattr(occupancy, source))


def help_text(series: Series) -> str:
    """What `/metrics` says about a series."""
    return f"HARD-KV, {series.unit}: {series.doc}"


def metrics_table() -> str:
    """The series as a Markdown table, for docs/metrics.md."""
    lines = ["| series | type | unit | meaning |", "|---|---|---|---|"]
    for kind, table in (("counter", COUNTERS), ("gauge", GAUGES)):
        lines += [f"| `{s.name}` | {kind} | {s.unit} | {s.doc} |" for s in table]
    return "\n".join(lines)


if __name__ == "__main__":
    write_or_print("metrics", metrics_table())
