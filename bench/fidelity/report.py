"""From result files to tables: JSON, CSV, and text for the terminal."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.fidelity.configurations import ABLATION_DOCUMENTS, Configuration
from bench.fidelity.tasks import Text
from bench.machine import environment

Finished = tuple[Configuration, Text, Path]
PACKAGES = ("torch", "transformers", "numpy", "hardkv-sglang")
TARGETS = (0.125, 0.25, 0.5)
"""Kept fractions at which policies are compared."""
NOT_SCORED = 640
"""First decoded tokens that do not count: with the shipped intervals the first event comes after them."""
HEADLINES = {
    "mean_kl": "mean KL",
    "p99_kl": "p99 KL",
    "agreement": "top-1",
    "perplexity_ratio": "ppl ratio",
    "kept": "kept",
    "generated": "generated",
    "generated_end": "gen. end",
    "request": "request",
    "attended": "attended",
}


def summarise(configuration: Configuration, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over documents of one configuration; the first `NOT_SCORED` decoded tokens do not count."""
    kl = [torch.tensor(result["kl"][NOT_SCORED:]) for result in results]
    agrees = [result["agrees"][NOT_SCORED:] for result in results]
    surprise = [extra_surprise(result) for result in results]
    parts = results[0]["bytes"]
    return {
        "name": configuration.name,
        "family": configuration.family,
        "options": configuration.options,
        "documents": [result["document"] for result in results],
        "mean_kl": mean(float(part.mean()) for part in kl),
        "p99_kl": float(torch.cat(kl).quantile(0.99)),
        "agreement": mean(part.count("1") / len(part) for part in agrees),
        "perplexity_ratio": math.exp(mean(surprise)),
        **{name: mean(result["bytes"][name] for result in results) for name in parts},
        "spread": spread(results),
        "seconds": sum(result["seconds"] for result in results),
        "mean_kl_by_document": {r["document"]: float(part.mean()) for r, part in zip(results, kl, strict=True)},
        "kept_by_document": {r["document"]: r["bytes"]["kept"] for r in results},
    }


def extra_surprise(result: dict[str, Any]) -> float:
    """Mean of compressed minus dense surprise over the scored tokens; it is 0 before a request's first event."""
    affected, scored = len(result["kl"]) - result["first_event"], len(result["kl"]) - NOT_SCORED
    return (result["compressed_nll"] - result["dense_nll"]) * affected / scored


def summarise_all(finished: Sequence[Finished]) -> list[dict[str, Any]]:
    """One summary per configuration, in the order of the sweep."""
    tasks: dict[str, list[Finished]] = {}
    for task in finished:
        tasks.setdefault(task[0].name, []).append(task)
    return [summarise(group[0][0], [json.loads(path.read_text()) for _, _, path in group]) for group in tasks.values()]


def spread(results: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Kept fraction per (layer, KV head) at the last select event: percentiles over lists and documents."""
    fractions = torch.cat([last_fractions(result) for result in results])
    levels = {"min": 0.0, "p10": 0.1, "median": 0.5, "p90": 0.9, "max": 1.0}
    return {name: float(fractions.quantile(level)) for name, level in levels.items()}


def last_fractions(result: dict[str, Any]) -> torch.Tensor:
    """Kept fraction of every list at the last select event, [L * H]."""
    event = result["selected"][-1]
    return torch.tensor(event["counts"]) / event["candidates"]


def interpolate(points: Sequence[dict[str, Any]], kept: float, field: str) -> float | None:
    """Value of a curve at a kept fraction; None outside of what was measured.

    KL is interpolated in its logarithm, everything over the logarithm of the kept fraction.
    """
    logarithmic = field.endswith("kl")
    curve = sorted((point["kept"], point[field]) for point in points if point["kept"] > 0)
    for (x0, y0), (x1, y1) in pairwise(curve):
        if x0 <= kept <= x1:
            share = (math.log(kept) - math.log(x0)) / max(math.log(x1) - math.log(x0), 1e-12)
            if logarithmic and min(y0, y1) > 0:
                return math.exp(math.log(y0) + share * (math.log(y1) - math.log(y0)))
            return y0 + share * (y1 - y0)
    return None


def compare_families(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every curve at equal kept bytes; points on fewer documents than the most are left out."""
    most = max(len(point["documents"]) for point in points)
    rows = []
    for family in dict.fromkeys(point["family"] for point in points):
        curve = [point for point in points if point["family"] == family and len(point["documents"]) == most]
        for kept in TARGETS:
            values = {field: interpolate(curve, kept, field) for field in ("mean_kl", "p99_kl", "agreement")}
            if values["mean_kl"] is not None:
                rows.append({"family": family, "kept": kept, **values})
    return rows


def compare_answers(finished: Sequence[Finished]) -> list[dict[str, Any]]:
    """Needle answers per configuration and depth."""
    rows = []
    for configuration, text, path in finished:
        for answer in json.loads(path.read_text())["answers"]:
            rows.append({"configuration": configuration.name, "document": text.name, **answer})
    return rows


@dataclass(frozen=True)
class Summary:
    """Points of the configurations that are finished, and where they come from."""

    points: list[dict[str, Any]]
    few: list[dict[str, Any]]  # the same on the documents of the ablations
    plain: list[Finished]  # without questions


def write_report(
    console: Console, root: Path, finished: Sequence[Finished], run: dict[str, Any], results: Path, name: str
) -> Summary:
    """Summarise everything that is finished: terminal, JSON and CSV. root: the repository; name: of the two files."""
    plain = [task for task in finished if not task[1].spans]
    points = summarise_all(plain)
    if not points:
        raise SystemExit("no results yet")
    few = summarise_all([task for task in plain if task[1].number < ABLATION_DOCUMENTS])
    report = {
        "run": run | environment(root, PACKAGES),
        "configurations": points,
        "equal_bytes": compare_families(points),
        "ablation_configurations": few,
        "ablation_equal_bytes": compare_families(few),
        "needles": compare_answers([task for task in finished if task[1].spans]),
    }
    results.mkdir(parents=True, exist_ok=True)
    (results / f"{name}.json").write_text(json.dumps(report, indent=1))
    write_csv(results / f"{name}.csv", points)
    console.print(headline_table(points))
    return Summary(points, few, plain)


def write_csv(path: Path, points: Sequence[dict[str, Any]]) -> None:
    """One line per configuration."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["configuration", "documents", *HEADLINES, *(f"spread_{name}" for name in points[0]["spread"])])
        for point in points:
            values = [*(point[name] for name in HEADLINES), *point["spread"].values()]
            writer.writerow([point["name"], len(point["documents"]), *(f"{value:.6g}" for value in values)])


def headline_table(points: Sequence[dict[str, Any]]) -> Table:
    """The main table, for the terminal."""
    table = Table("configuration", "docs", *HEADLINES.values())
    for point in points:
        table.add_row(point["name"], str(len(point["documents"])), *(f"{point[name]:.4f}" for name in HEADLINES))
    return table
