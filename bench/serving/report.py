"""Results as JSON, Markdown, a table for the terminal, and pictures."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.serving.plots import draw_all
from bench.serving.presets import Preset
from bench.serving.summary import Finished, summarise
from bench.serving.systems import System

Row = dict[str, Any]


def number(name: str, digits: int = 0) -> Callable[[Row], str]:
    """Cell text of one figure; a dash where it does not exist."""

    def text(row: Row) -> str:
        value = row["figures"][name]
        return "-" if value is None else f"{value:.{digits}f}"

    return text


def pair(first: Callable[[Row], str], second: Callable[[Row], str]) -> Callable[[Row], str]:
    """Cell text of two figures."""
    return lambda row: f"{first(row)} / {second(row)}"


COLUMNS: dict[str, Callable[[Row], str]] = {
    "workload": lambda row: row["workload"],
    "clients": lambda row: str(row["clients"]),
    "requests": lambda row: str(row["requests"]),
    "system": lambda row: row["system"],
    "seconds": number("seconds", 1),
    "output tok/s": number("output_tokens_per_second", 1),
    "ratio": lambda row: f"{row['throughput_ratio']:.2f}x",
    "req/s": number("requests_per_second", 3),
    "running, mean / most": pair(number("running_mean", 1), number("running_max")),
    "TTFT p50 / p99, ms": pair(number("ttft_p50_ms"), number("ttft_p99_ms")),
    "TPOT p50 / p99, ms": pair(number("tpot_p50_ms", 1), number("tpot_p99_ms", 1)),
    "peak tokens": number("peak_tokens"),
    "retractions": number("retractions"),
    "events, select / condense": pair(number("select_events"), number("condense_events")),
    "kept": number("kept_fraction", 2),
    "load": number("load_average", 1),
}
NARROW = ("workload", "clients", "system", "seconds", "output tok/s", "ratio", "peak tokens", "retractions", "kept")
"""Columns that fit a terminal."""
NOTES = """\
Times, throughput, TTFT and TPOT are those of `sglang.benchmark.serving`; the time is that of all requests of a line.
`ratio` is output tok/s against {baseline} on the same load. Running requests and peak tokens (of the pool, held by
running requests) are SGLang's decode log, one line every {interval} steps; retractions count a request each time
that it is thrown out of a full pool. `kept` is the share of scored tokens that select events kept. `load`
is the load average of the machine over the last minute: on a CPU, times count only if nothing but the benchmark ran.
Medians over rounds."""


def write_report(
    console: Console,
    preset: Preset,
    systems: Sequence[System],
    finished: Sequence[Finished],
    run: dict[str, Any],
    folders: tuple[Path, Path],
) -> None:
    """Write everything about the finished cells, at least one; folders: of JSON and Markdown, and of pictures."""
    results, pictures = folders
    results.mkdir(parents=True, exist_ok=True)
    pictures.mkdir(parents=True, exist_ok=True)
    report = build_report(preset, systems, finished, run)
    name = f"serving_{preset.name}"
    (results / f"{name}.json").write_text(json.dumps(report, indent=1))
    (results / f"{name}.md").write_text(markdown(report))
    draw_all(pictures, name, report["rows"], finished, preset.pool_tokens)
    console.print(terminal_table(report["rows"]))
    console.print(f"written: {results / name}.json, {results / name}.md, {pictures / name}_*.png")


def build_report(
    preset: Preset, systems: Sequence[System], finished: Sequence[Finished], run: dict[str, Any]
) -> dict[str, Any]:
    """The JSON report; the samples over time stay in the result files."""
    used = {cell.workload.name: cell.workload for cell, _ in finished}
    return {
        "run": run
        | {
            "preset": preset.name,
            "model": preset.model,
            "layers": preset.layers or "all",
            "pool_tokens": preset.pool_tokens,
            # results may be older than the work tree
            "measured_commits": sorted({result["commit"] for _, result in finished}),
        },
        "systems": {
            system.name: {
                "meaning": system.meaning,
                "flags": dict(system.flags),
                "resolved": next((r["resolved"] for c, r in finished if c.system.name == system.name), None),
            }
            for system in systems
        },
        "workloads": {
            name: {"meaning": workload.meaning, **{str(c): workload.arguments(c) for c in workload.concurrency}}
            for name, workload in used.items()
        },
        "rows": summarise(finished),
        "measurements": [
            {
                "system": cell.system.name,
                "workload": cell.workload.name,
                "clients": cell.clients,
                "round": cell.round,
                **result["figures"],
            }
            for cell, result in finished
        ],
    }


def markdown(report: dict[str, Any]) -> str:
    """The report as Markdown: table first, then what is needed to repeat it."""
    rows, run = report["rows"], report["run"]
    interval = next(iter(report["systems"].values()))["flags"].get("decode-log-interval", 40)
    lines = [f"# Serving benchmark, preset {run['preset']}", ""]
    lines += ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(text(row) for text in COLUMNS.values()) + " |" for row in rows]
    lines += ["", NOTES.format(baseline=rows[0]["baseline"], interval=interval), "", "## Run", ""]
    lines += [f"- {name}: {value}" for name, value in run.items()]
    lines += ["", "## Servers", ""]
    for name, system in report["systems"].items():
        flags = " ".join(
            f"--{flag}" if value is True else f"--{flag} {value}" for flag, value in system["flags"].items()
        )
        lines.append(f"- `{name}`, {system['meaning']}: `{flags}`; resolved: {json.dumps(system['resolved'])}")
    lines += ["", "## Workloads", ""]
    for name, workload in report["workloads"].items():
        arguments = [
            f"{clients} clients: `{' '.join(words)}`" for clients, words in workload.items() if clients != "meaning"
        ]
        lines.append(f"- `{name}`, {workload['meaning']}: " + "; ".join(arguments))
    return "\n".join(lines) + "\n"


def terminal_table(rows: Sequence[Row]) -> Table:
    """The table, for the terminal."""
    table = Table(*NARROW)
    for row in rows:
        table.add_row(*(COLUMNS[name](row) for name in NARROW))
    return table
