"""Pictures of results from a GPU: kernels against FlashInfer and copying, and where the time of a decode step goes.

PYTHONPATH=. python3 bench/kernels/draw.py bench/results docs/img
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from hardkv_sglang.config import HardKVConfig

# "observe" is the name in traces from before it became part of "finish"
GROUPS = (
    "matrix products", "dense attention", "ragged_decode", "shared_prefix", "observe", "finish", "ragged_plan",
    "events", "other",
)  # fmt: skip
CASES = {"stock": "stock, 32 x 16.4k", "compressed": "compressed, 32 requests"}


def draw_kernels(path: Path, report: dict[str, Any]) -> None:
    """Ragged decode beside FlashInfer's dense decode of the same bytes, and what copying them would take."""
    rows = [row for row in report["rows"] if row.get("flashinfer_merge_p50_us")]
    copying = [1e12 * row["mbytes"] / report["copy_bytes_per_s"] for row in rows]
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axes = figure.subplots()
    series = {
        "ragged decode, merged": [row["p50_us"] for row in rows],
        "FlashInfer dense, merged": [row["flashinfer_merge_p50_us"] for row in rows],
        "copy bandwidth": copying,
    }
    for i, (name, values) in enumerate(series.items()):
        bars = axes.bar([x + 0.27 * (i - 1) for x in range(len(rows))], values, width=0.26, label=name)
        axes.bar_label(bars, fmt="%.0f", fontsize=7)
    axes.set_xticks(
        range(len(rows)), [row["shape"].replace(" lists", "").replace(", ", "\n") for row in rows], fontsize=8
    )
    axes.set(yscale="log", ylabel="us per layer", title=f"{report['gpu']}, lists per layer, bf16, d = 128")
    axes.legend()
    figure.savefig(path, dpi=120)


def draw_shared(path: Path, report: dict[str, Any]) -> None:
    """Prefixes attended once for each group, relative to FlashInfer request by request, over what that saves."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for batch in sorted({row["batch"] for row in report["rows"]}):
        rows = [row for row in report["rows"] if row["batch"] == batch]
        axes.plot([row["saved_tokens"] for row in rows], [row["ratio"] for row in rows], "o", label=f"{batch} requests")
    axes.axhline(1, color="grey", linewidth=0.8)
    default = HardKVConfig().min_shared_tokens
    if default is not None:
        axes.axvline(default, color="grey", linestyle="--", label="default of min_shared_tokens")
    axes.set(
        xscale="log", xlabel="reads of a token saved per step", ylabel="speed of attention, times FlashInfer",
        title=f"{report['gpu']}, 8 KV heads, bf16, d = 128",
    )  # fmt: skip
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def draw_steps(path: Path, report: dict[str, Any]) -> None:
    """GPU time of one decode step by kernel group, and the time in which nothing runs."""
    traces = {}
    for case, label in CASES.items():
        result = report["results"][case]
        traces[label] = result["trace"] if "trace" in result else result["32x16384"]["trace"]
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(traces)
    for group in (*GROUPS, "idle"):
        values = [
            (t["step_us"] - t["busy_us"] if group == "idle" else t["groups_us"].get(group, 0.0)) / 1e3
            for t in traces.values()
        ]
        axes.barh(list(traces), values, left=left, label=group)
        left = [x + value for x, value in zip(left, values, strict=True)]
    axes.invert_yaxis()
    axes.set(xlabel="ms per decode step", title=f"{report['environment']['gpu']}, {report['model']} shape, bf16")
    figure.legend(*axes.get_legend_handles_labels(), fontsize=8, ncols=8, loc="outside lower center")
    figure.savefig(path, dpi=120)


def main() -> None:
    results, pictures = Path(sys.argv[1]), Path(sys.argv[2])
    draw_kernels(pictures / "kernels_h200.png", json.loads((results / "ragged_decode_h200.json").read_text()))
    draw_shared(pictures / "shared_prefix_h200.png", json.loads((results / "shared_prefix_h200.json").read_text()))
    draw_steps(pictures / "step_h200.png", json.loads((results / "decode_speed_h200.json").read_text()))


if __name__ == "__main__":
    main()
