"""Pictures of a run: throughput against concurrency, and requests and pool over time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.serving.summary import THROUGHPUT, Finished
from bench.serving.systems import NAMES

COLORS = dict(zip(NAMES, ("tab:gray", "tab:blue", "tab:orange"), strict=True))
PANEL = (4.2, 3.2)  # inches


def draw_all(
    folder: Path, name: str, rows: Sequence[dict[str, Any]], finished: Sequence[Finished], pool_tokens: int
) -> None:
    """Write `{name}_throughput.png` and `{name}_time.png`."""
    draw_throughput(folder / f"{name}_throughput.png", rows)
    draw_time(folder / f"{name}_time.png", finished, pool_tokens)


def draw_throughput(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Output tokens per second against clients: medians, with the range over rounds; one panel per workload."""
    workloads = list(dict.fromkeys(row["workload"] for row in rows))
    figure, panels = _figure(1, len(workloads))
    for panel, workload in zip(panels[0], workloads, strict=True):
        for system in NAMES:
            points = [row for row in rows if row["workload"] == workload and row["system"] == system]
            if not points:
                continue
            clients, rates = [row["clients"] for row in points], [row["figures"][THROUGHPUT] for row in points]
            below = [rate - row["throughput_range"][0] for rate, row in zip(rates, points, strict=True)]
            above = [row["throughput_range"][1] - rate for rate, row in zip(rates, points, strict=True)]
            panel.errorbar(clients, rates, (below, above), marker="o", capsize=3, color=COLORS[system], label=system)
        panel.set(
            title=workload, xlabel="clients", xticks=sorted({r["clients"] for r in rows if r["workload"] == workload})
        )
        panel.set_ylim(bottom=0)
    panels[0][0].set_ylabel("output tokens per second")
    panels[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=130)


def draw_time(path: Path, finished: Sequence[Finished], pool_tokens: int) -> None:
    """Running requests and held pool tokens over time, of each workload with the most clients, in the first round."""
    workloads = list({cell.workload.name: cell.workload for cell, _ in finished}.values())
    figure, panels = _figure(2, len(workloads))
    for column, workload in enumerate(workloads):
        shown = [(cell, result) for cell, result in finished if cell.workload.name == workload.name and cell.round == 0]
        most = max((cell.clients for cell, _ in shown), default=0)
        upper, lower = panels[0][column], panels[1][column]
        for cell, result in shown:
            if cell.clients == most:
                _draw_samples(upper, lower, cell.system.name, result["samples"])
        upper.set(title=f"{workload.name}, {most} clients")
        lower.axhline(pool_tokens, color="black", linewidth=0.8, linestyle="--", label="pool")
        lower.set(xlabel="seconds since the first decode line")
        for panel in (upper, lower):
            panel.set_xlim(left=0)
            panel.set_ylim(bottom=0)
    panels[0][0].set_ylabel("running requests")
    panels[1][0].set_ylabel("pool tokens of running requests")
    panels[1][0].legend(fontsize=8)
    figure.savefig(path, dpi=130)


def _draw_samples(upper: Axes, lower: Axes, system: str, samples: Sequence[dict[str, Any]]) -> None:
    seconds = [sample["seconds"] - samples[0]["seconds"] for sample in samples]
    for panel, name in ((upper, "running"), (lower, "tokens")):
        values = [sample[name] for sample in samples]
        panel.plot(seconds, values, color=COLORS[system], marker=".", markersize=3, linewidth=1.2, label=system)


def _figure(rows: int, columns: int) -> tuple[Figure, Any]:
    figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)
