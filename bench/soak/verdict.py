"""What must hold after the load, each as one line of the result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench.soak.client import Client
from bench.soak.load import Record
from bench.soak.readings import compression, differences, fixed_answer, published, wait_idle
from hardkv_sglang.observability.metrics import GAUGES

GROWTH_FRACTION, GROWTH_BYTES = 0.05, 64 << 20
"""Resident memory may grow by so much between the second and the last quarter of the load."""


@dataclass(frozen=True)
class Check:
    """One statement, whether it holds, and what was seen."""

    statement: str
    holds: bool
    seen: Any


def check_requests(record: Record, still_waiting: int) -> Check:
    """Every request was answered or aborted as asked."""
    seen = {
        "answered": sum(record.ends.values()),
        "failures": [str(failure) for failure in record.failures[:5]],
        "without answer": still_waiting,
    }
    return Check(check_requests.__doc__ or "", not record.failures and not still_waiting, seen)


def check_pages(client: Client) -> Check:
    """No request and no token is held."""
    held = wait_idle(client)
    return Check(check_pages.__doc__ or "", not held, held)


def check_counters(client: Client, history: Sequence[dict[str, float]]) -> list[Check]:
    """Checks of the counters; none for a stock server."""
    counters = compression(client)
    if counters is None:
        return []
    values = published(client, counters)
    wrong = differences(counters, values)
    shrunk = [
        name for before, after in zip(history, [*history[1:], counters], strict=True) for name in before
        if after[name] < before[name]
    ]  # fmt: skip
    gauges = {g.source: values[g.source] for g in GAUGES if g.source != "kept_ratio" and values[g.source]}
    selects, condenses = counters["select_events"], counters["condense_events"]
    balance = counters["freed_pages"] - counters["allocated_pages"]
    return [
        Check("events ran, and each condense event follows a select event", 0 < condenses <= selects, counters),
        Check("condense events free more pages than they take", balance > 0, balance),
        Check("/metrics and /server_info agree", not wrong, wrong),
        Check("no counter ever shrank", not shrunk, sorted(set(shrunk))),
        Check("nothing is running by the gauges", not gauges, gauges),
    ]


def check_memory(samples: Sequence[int]) -> Check:
    """Resident memory has not grown since the second quarter."""
    quarter = len(samples) // 4
    before, after = max(samples[quarter : 2 * quarter], default=0), max(samples[3 * quarter :], default=0)
    bound = before * (1 + GROWTH_FRACTION) + GROWTH_BYTES
    seen = {"second quarter MB": before >> 20, "last quarter MB": after >> 20, "bound MB": int(bound) >> 20}
    return Check(check_memory.__doc__ or "", quarter > 0 and after <= bound, seen)


def check_fixed_answer(client: Client, before: list[int]) -> Check:
    """A fixed greedy request equals its output before."""
    after = fixed_answer(client, len(before))
    equal = next(
        (i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(before), len(after))
    )
    return Check(check_fixed_answer.__doc__ or "", after == before, {"tokens": len(before), "equal": equal})
