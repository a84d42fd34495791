"""The frontier benchmark: what it counts, how it compares, and a short run on the CPU."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.fidelity.frontier import NOT_SCORED, Worker, held_share, kl_since_event, main, read_lines
from bench.fidelity.frontier_points import frontier_points, kept, tri
from bench.fidelity.frontier_report import at_held, summarise_all
from bench.fidelity.needle import Span
from bench.fidelity.quantised import QUANTISATIONS
from bench.fidelity.session import PAGE_SIZE
from bench.fidelity.tasks import Text


def holding(position: int, pages: int) -> SimpleNamespace:
    return SimpleNamespace(position=position, held_pages=pages)


def test_held_is_the_sum_over_time() -> None:
    unscored = [holding(PAGE_SIZE, 99)] * NOT_SCORED
    # two prompt pages; then 4 and 6 dense pages of output, of which 2 and 3 are held
    later = [holding(6 * PAGE_SIZE - 1, 4), holding(8 * PAGE_SIZE - 1, 5)]
    found = held_share(SimpleNamespace(holdings=unscored + later), 2 * PAGE_SIZE)  # type: ignore[arg-type]
    assert found == {"held": 5 / 10, "held_end": 3 / 6}


def test_kl_goes_by_distance_from_the_last_event() -> None:
    selected = [SimpleNamespace(seq_len=10), SimpleNamespace(seq_len=80)]
    holdings = [holding(position, 0) for position in range(300)]
    session: Any = SimpleNamespace(holdings=holdings, selected=selected)
    kl = [100.0] * 10 + [1.0] * 64 + [2.0] * 6 + [3.0] * 64 + [4.0] * 64 + [5.0] * 92
    bins = kl_since_event(kl, session)
    assert bins[:3] == [2.0, (2.0 * 6 + 4.0 * 64) / 70, 5.0]
    assert bins[3] == 5.0 and bins[4] is None


def test_a_family_is_compared_by_its_best_points() -> None:
    points = [{"held": 0.2, "kl": 0.04}, {"held": 0.3, "kl": 0.05}, {"held": 0.8, "kl": 0.01}]
    assert at_held(points, 0.4) == pytest.approx(0.02)
    assert at_held(points, 0.1) is None and at_held(points, 0.9) is None


def test_points_are_compared_on_common_texts() -> None:
    line = {"family": "f", "held": 0.5, "held_end": 0.5, "agreement": 1.0, "seconds": 1.0}
    lines = [
        {"point": "a", "text": "x", "kl": 1.0, **line},
        {"point": "a", "text": "y", "kl": 9.0, **line},
        {"point": "b", "text": "x", "kl": 2.0, **line},
    ]
    assert [(point["kl"], point["texts"]) for point in summarise_all(lines)] == [(1.0, 1), (2.0, 1)]


def test_points_are_distinct_and_valid() -> None:
    points = frontier_points()
    assert len({point.name for point in points}) == len(points)
    assert all(point.config for point in points if point.quantisation is None)


@pytest.mark.parametrize(("name", "error"), [("fp8_e4m3", 0.07), ("fp8_e5m2", 0.13), ("int8", 0.02), ("int4", 0.25)])
def test_rounding_errors_are_those_of_the_format(name: str, error: float) -> None:
    rows = torch.randn(4, 100, 64, generator=torch.Generator().manual_seed(1))
    rounded = QUANTISATIONS[name].round(rows)
    relative = float((rounded - rows).norm() / rows.norm())
    assert error / 8 < relative < error
    assert torch.equal(QUANTISATIONS["fp8_e4m3"].round(rounded) if name == "fp8_e4m3" else rounded, rounded)


@pytest.mark.slow
def test_a_run_resumes_and_reports(demo_model: Path, tmp_path: Path) -> None:
    words = [(31 * i * i + 17 * i) % 20000 + 500 for i in range(97)]
    tokens = torch.tensor((words * 10)[: 33 + NOT_SCORED + 60])
    points = [kept(128, 0.2), tri(64, 128), *(point for point in frontier_points() if point.quantisation == "int8")]
    out = tmp_path / "demo.jsonl"
    spans = [Span("red", 0.1, len(tokens) - 6, len(tokens) - 4), Span("blue", 0.9, len(tokens) - 3, len(tokens) - 1)]
    texts = [Text("words", 0, tokens, 32, spans)]
    worker = Worker(demo_model, "cpu", "float32", texts, points, out, time.time() + 1e4)
    worker.run()
    compressed, rated, rounded = read_lines(out)
    assert compressed["answers"] == 2 and 0 <= rated["still_right"] <= rated["dense_right"] <= 2
    assert rated["kl"] != compressed["kl"] and rated["events"] >= 3
    assert compressed["events"] >= 3 and 0.2 < compressed["held"] < 0.6
    assert 0 < rounded["kl"] < compressed["kl"] < 1
    worker.run()
    assert len(read_lines(out)) == 3
    assert main(["--report", str(out), "--results", str(tmp_path / "report"), "--name", "short"]) == 0
    report = json.loads((tmp_path / "report" / "short.json").read_text())
    assert {point["point"] for point in report["demo"]["points"]} == {point.name for point in points}
    assert (tmp_path / "report" / "short.csv").read_text().count("\n") == 4
    assert (tmp_path / "report" / "short.png").exists()
