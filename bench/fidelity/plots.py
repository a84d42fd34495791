"""Pictures of a full run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from bench.fidelity.report import Finished, last_fractions

DRAWN_FAMILY = "hardkv"
DRAWN_KEPT = 0.25
"""The budgets that are drawn are those of the configuration that comes closest to this kept fraction."""


def draw_all(
    folder: Path, points: Sequence[dict[str, Any]], few: Sequence[dict[str, Any]], finished: Sequence[Finished]
) -> None:
    """Write every picture that the results allow; few: the same points on the documents of the ablations."""
    folder.mkdir(parents=True, exist_ok=True)
    draw_curves(folder / "fidelity_kl.png", points)
    draw_curves(folder / "fidelity_kl_few.png", few)
    adaptive = [point for point in points if point["family"] == DRAWN_FAMILY]
    if not adaptive:
        return
    name = min(adaptive, key=lambda point: abs(point["kept"] - DRAWN_KEPT))["name"]
    results = [json.loads(path.read_text()) for configuration, _, path in finished if configuration.name == name]
    draw_heads(folder / "fidelity_heads.png", results, name)
    draw_budgets(folder / "fidelity_budgets.png", results, name)


def draw_curves(path: Path, points: Sequence[dict[str, Any]]) -> None:
    """Mean KL and top-1 agreement against the kept fraction, one line per family on all documents."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    most = max(len(point["documents"]) for point in points)
    families = dict.fromkeys(point["family"] for point in points)
    for family in (family for family in families if not family.startswith("ablation")):
        curve = [point for point in points if point["family"] == family and len(point["documents"]) == most]
        curve = sorted((point for point in curve if point["mean_kl"] > 1e-6), key=lambda point: point["kept"])
        if not curve:
            continue
        kept = [point["kept"] for point in curve]
        left.plot(kept, [point["mean_kl"] for point in curve], marker="o", label=family)
        right.plot(kept, [100 * point["agreement"] for point in curve], marker="o", label=family)
    right.set(xlabel="kept fraction (condensed token pages)", ylabel="top-1 agreement, %", xscale="log")
    left.set(xlabel="kept fraction (condensed token pages)", ylabel="mean KL(dense || compressed), nats per token")
    left.set(xscale="log", yscale="log")
    for axis in (left.xaxis, left.yaxis, right.xaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("{x:g}")
    left.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def draw_heads(path: Path, results: Sequence[dict[str, Any]], name: str) -> None:
    """Kept fraction of every layer and KV head at the last select event, mean over documents."""
    kept = torch.stack([last_fractions(result) for result in results]).mean(0)
    figure = Figure(figsize=(11, 3), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(kept.view(-1, results[0]["num_kv_heads"]).T, aspect="auto", vmin=0, cmap="viridis")
    axes.set(xlabel="layer", ylabel="KV head", yticks=range(results[0]["num_kv_heads"]), title=name)
    figure.colorbar(image, label="kept fraction")
    figure.savefig(path, dpi=130)


def draw_budgets(path: Path, results: Sequence[dict[str, Any]], name: str) -> None:
    """Kept tokens per list over time: mean and the widest list of every document."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for result in results:
        events = result["selected"]
        decoded = [event["seq_len"] - result["prompt_len"] for event in events]
        left.plot(decoded, [sum(event["counts"]) / len(event["counts"]) for event in events], label=result["document"])
        right.plot(decoded, [max(event["counts"]) for event in events])
    left.set(xlabel="decoded tokens", ylabel="kept tokens per head, mean", title=name)
    right.set(xlabel="decoded tokens", ylabel="kept tokens of the widest head")
    left.legend(fontsize=8)
    figure.savefig(path, dpi=130)
