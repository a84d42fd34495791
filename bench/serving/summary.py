"""From results to rows: medians over rounds, and ratios against stock."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from bench.serving.cells import Cell
from bench.serving.systems import NAMES

Finished = tuple[Cell, dict[str, Any]]
THROUGHPUT = "output_tokens_per_second"


def summarise(finished: Sequence[Finished]) -> list[dict[str, Any]]:
    """One row per workload, number of clients and system, in that order.

    A row holds the median of every figure over the rounds, the range of the throughput, and `throughput_ratio` and
    `seconds_ratio` against the first system of `NAMES` that was measured on the same load.
    """
    groups: dict[tuple[str, int, str], list[Finished]] = {}
    for cell, result in finished:
        groups.setdefault((cell.workload.name, cell.clients, cell.system.name), []).append((cell, result))
    order = list(dict.fromkeys(name for name, _, _ in groups))
    rows = [
        _row(groups[key]) for key in sorted(groups, key=lambda key: (order.index(key[0]), key[1], NAMES.index(key[2])))
    ]
    for row in rows:
        baseline = next(other for other in rows if _load(other) == _load(row))
        row["baseline"] = baseline["system"]
        row["throughput_ratio"] = row["figures"][THROUGHPUT] / baseline["figures"][THROUGHPUT]
        row["seconds_ratio"] = row["figures"]["seconds"] / baseline["figures"]["seconds"]
    return rows


def _load(row: dict[str, Any]) -> tuple[str, int]:
    return row["workload"], row["clients"]


def _row(group: Sequence[Finished]) -> dict[str, Any]:
    cell, first = group[0]
    values = {name: [result["figures"][name] for _, result in group] for name in first["figures"]}
    return {
        "workload": cell.workload.name,
        "clients": cell.clients,
        "requests": cell.workload.num_requests(cell.clients),
        "system": cell.system.name,
        "rounds": len(group),
        "figures": {name: _median(numbers) for name, numbers in values.items()},
        "throughput_range": [min(values[THROUGHPUT]), max(values[THROUGHPUT])],
    }


def _median(values: Sequence[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return median(numbers) if numbers else None
