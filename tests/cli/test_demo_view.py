"""What the demo prints, on a terminal and without one."""

from __future__ import annotations

import re
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from hardkv_sglang.cli.chart import BARS
from hardkv_sglang.cli.demo import Answer
from hardkv_sglang.cli.demo_view import DemoView
from hardkv_sglang.cli.snapshot import Snapshot
from hardkv_sglang.lifecycle.request_state import RequestState
from hardkv_sglang.observability.occupancy import Occupancy
from hardkv_sglang.observability.statistics import RequestReport, Statistics

PAGE = 16
DENSE = Answer("[bold]is no markup[/bold] and stays as the model wrote it", 40, is_complete=True)
COMPRESSED = Answer("another answer", 50, is_complete=False)


def view_of(is_terminal: bool) -> tuple[DemoView, StringIO]:
    output = StringIO()
    return DemoView(Console(file=output, width=100, force_terminal=is_terminal, highlight=False)), output


def snapshot(used_tokens: int) -> Snapshot:
    load = {
        "num_running_reqs": 3, "num_waiting_reqs": 0, "gen_throughput": 9.0, "max_total_num_tokens": 4096,
        "num_used_tokens": used_tokens,
    }  # fmt: skip
    state = {"running": Occupancy.of([], PAGE).to_dict(), **Statistics(condense_events=7).to_dict()}
    return Snapshot.of([load], [state], "")


def server_state() -> dict[str, Any]:
    """What `/server_info` says of a server that compressed one request."""
    state = RequestState(1, 32, 96, 160, 0, num_condensed_pages=1, kept_counts=[8, 16], seq_len=200)
    report = RequestReport.of("compressed-0", state, 200, 40, PAGE)
    statistics = Statistics.keeping(8)
    statistics.select_events, statistics.condense_events = 2, 1
    statistics.freed_pages, statistics.allocated_pages = 4, 1
    statistics.reports.append(report)
    return {"page_bytes": 1_000_000, **statistics.to_dict()}


@pytest.mark.parametrize("is_terminal", [True, False])
def test_both_answers_stand_below_their_prompt(is_terminal: bool) -> None:
    view, output = view_of(is_terminal)
    view.compare("What is it?", DENSE, COMPRESSED)
    text = " ".join(output.getvalue().split())
    assert "What is it?" in text
    assert "dense, 40 tokens" in text
    assert "compressed, 50 tokens, cut off" in text
    assert "[bold]is no markup" in text
    assert "another answer" in text


def test_answers_are_side_by_side_on_a_terminal() -> None:
    view, output = view_of(True)
    view.compare("What is it?", DENSE, COMPRESSED)
    assert any("markup" in line and "another answer" in line for line in output.getvalue().splitlines())


@pytest.mark.parametrize("is_terminal", [True, False])
def test_rounds_are_drawn_on_one_scale(is_terminal: bool) -> None:
    view, output = view_of(is_terminal)
    for name, highest in (("dense", 700), ("compressed", 350)):
        with view.watching(name) as show:
            for used in (0, highest):
                show(snapshot(used))
    text = output.getvalue()
    assert re.search(f"pool, dense: at most 700 +{BARS[0]}{BARS[7]}", text)
    assert re.search(f"pool, compressed: at most 350 +{BARS[0]}{BARS[4]}", text)
    assert is_terminal or "\x1b" not in text


def test_a_long_round_fits_the_width() -> None:
    view, output = view_of(False)
    with view.watching("dense") as show:
        for used in range(500):
            show(snapshot(used))
    assert max(map(len, output.getvalue().splitlines())) <= 100


def test_summary_counts_pages_and_bytes() -> None:
    view, output = view_of(False)
    state = server_state()
    view.summarise(state, state["requests"])
    text = output.getvalue()
    # 13 pages dense; 4 freed, 1 taken for survivors
    assert "KV held at the end: 10 of 13 token pages, 77 % of dense" in text
    assert "13.0 MB" in text
    assert "10.0 MB" in text
    assert "returned to SGLang while requests ran: 3" in text


def test_summary_without_any_compressed_request() -> None:
    view, output = view_of(False)
    view.summarise({"page_bytes": 1, **Statistics().to_dict()}, [])
    assert "0 of 0 token pages" in output.getvalue()
