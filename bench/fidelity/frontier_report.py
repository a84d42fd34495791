"""Tables and a picture of a frontier run."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

HELD_OUT = re.compile(r"licence|handbook|cpp|generated_(interview|lessons|glossary)_\w+")
"""Names of texts that no choice was made on."""
AT = (0.25, 0.35)
"""Held shares at which families are compared."""
DRAWN = (
    "hardkv, remembered and prior", "hardkv, remembered and prior, top_p", "defaults", "observed only", "streaming",
    "rkv", "snapkv", "tri",
)  # fmt: skip
FIELDS = ("texts", "held", "held_end", "kl", "kl_error", "kl_held_out", "agreement", "recall", "seconds")


def summarise(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means of one point over texts; kl_error: standard error of the mean KL."""
    kl = [line["kl"] for line in lines]
    held_out = [line["kl"] for line in lines if HELD_OUT.fullmatch(line["text"])]
    return {
        "point": lines[0]["point"],
        "family": lines[0]["family"],
        "texts": len(lines),
        **{name: mean(line[name] for line in lines) for name in ("held", "held_end", "kl", "agreement", "seconds")},
        "kl_error": stdev(kl) / math.sqrt(len(kl)) if len(kl) > 1 else 0.0,
        "kl_held_out": mean(held_out) if held_out else None,
        "recall": recall_of(lines),
        "kl_by_text": {line["text"]: line["kl"] for line in lines},
    }


def recall_of(lines: Sequence[dict[str, Any]]) -> str | None:
    """Facts that are answered right over those that the dense model answers right; None without such texts."""
    asked = [line for line in lines if "dense_right" in line]
    if not asked:
        return None
    return f"{sum(line['still_right'] for line in asked)}/{sum(line['dense_right'] for line in asked)}"


def summarise_all(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One summary per point, by held bytes, over the texts on which all points ran."""
    points: dict[str, dict[str, dict[str, Any]]] = {}
    for line in lines:
        points.setdefault(line["point"], {})[line["text"]] = line
    common = set.intersection(*(set(group) for group in points.values()))
    if not common:
        raise SystemExit("the points have no text in common: finish the run, or leave points out")
    found = [summarise([line for text, line in group.items() if text in common]) for group in points.values()]
    return sorted(found, key=lambda point: point["held"])


def at_held(points: Sequence[dict[str, Any]], held: float) -> float | None:
    """KL of a family's lower envelope at a held share, in logarithms; None outside of what was measured."""
    best: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda point: point["held"]):
        if not best or point["kl"] < best[-1][1]:
            best.append((point["held"], point["kl"]))
    for (x0, y0), (x1, y1) in pairwise(best):
        if x0 <= held <= x1:
            share = (math.log(held) - math.log(x0)) / (math.log(x1) - math.log(x0))
            return math.exp(math.log(y0) + share * (math.log(y1) - math.log(y0)))
    return None


def compare(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Families at equal held bytes."""
    families: dict[str, list[dict[str, Any]]] = {}
    for point in points:
        if point["kl"] > 0:
            families.setdefault(point["family"], []).append(point)
    found = [(family, held, at_held(group, held)) for family, group in families.items() for held in AT]
    return [{"family": family, "held": held, "kl": kl} for family, held, kl in found if kl is not None]


def write_frontier(lines: Mapping[str, Sequence[dict[str, Any]]], folder: Path, name: str) -> None:
    """JSON, CSV, PNG and a table in the terminal. lines: results by model."""
    folder.mkdir(parents=True, exist_ok=True)
    models = {model: summarise_all(part) for model, part in lines.items()}
    report = {model: {"points": points, "equal_held": compare(points)} for model, points in models.items()}
    (folder / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    with (folder / f"{name}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["model", "point", *FIELDS])
        for model, points in models.items():
            writer.writerows([model, point["point"], *(shown(point[field]) for field in FIELDS)] for point in points)
    draw(folder / f"{name}.png", models)
    for model, points in models.items():
        Console().print(table_of(model, points))


def shown(value: Any) -> str:
    """A number for a table."""
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def table_of(model: str, points: Sequence[dict[str, Any]]) -> Table:
    """One model's points."""
    table = Table("point", *FIELDS, title=model)
    for point in points:
        table.add_row(point["point"], *(shown(point[field]) for field in FIELDS))
    return table


def draw(path: Path, models: Mapping[str, Sequence[dict[str, Any]]]) -> None:
    """Mean KL against held bytes, a panel per model."""
    figure = Figure(figsize=(5 * len(models), 4.2), layout="constrained")
    for axes, (model, points) in zip(figure.subplots(1, len(models), squeeze=False)[0], models.items(), strict=True):
        for family in DRAWN:
            group = [point for point in points if point["family"] == family]
            x, y = ([100 * point["held"] for point in group], [point["kl"] for point in group])
            error = [point["kl_error"] for point in group]
            axes.errorbar(x, y, yerr=error, marker="o", linestyle="none", capsize=2, label=family)
        axes.set(
            title=model, xlabel="held bytes of the output, mean over time, %", ylabel="mean KL, nats", yscale="log"
        )
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=130)
