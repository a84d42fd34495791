"""`hardkv top` against HTTP servers that answer as SGLang does, or do not."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread, Timer
from typing import Any

import pytest

from hardkv_sglang.cli.chart import BARS, sparkline
from hardkv_sglang.cli.main import main
from hardkv_sglang.lifecycle.request_state import RequestState
from hardkv_sglang.observability.occupancy import Occupancy
from hardkv_sglang.observability.statistics import Statistics

Replies = Mapping[str, tuple[int, str]]

LOAD = {
    "num_running_reqs": 3, "num_waiting_reqs": 1, "gen_throughput": 12.5, "max_total_num_tokens": 4096,
    "num_used_tokens": 1024,
}  # fmt: skip
METRICS = """\
# TYPE sglang:num_retracted_requests_total counter
sglang:num_retracted_requests_total{model_name="a b",tp_rank="0"} 2.0
sglang:num_retracted_requests_total{model_name="a b",tp_rank="1"} 1.0
"""


def replica() -> dict[str, Any]:
    """The `hardkv` block of one replica, from the classes that write it."""
    # 32 of 96 tokens past the prefix are condensed, to one page of 16
    state = RequestState(1, 32, 64, 96, 0, num_condensed_pages=1, seq_len=128)
    statistics = Statistics(select_events=4, condense_events=2, early_events=1, postponed_events=3, freed_pages=6)
    statistics.count_selection(candidate_tokens=100, kept_tokens=25.0, kept_mass=0.9, infeasible_lists=0)
    return {"running": Occupancy.of([state], 16).to_dict(), **statistics.to_dict()}


def replies(states: list[dict[str, Any]], metrics: str | None = None) -> dict[str, tuple[int, str]]:
    """What a server says."""
    info = {"internal_states": states}
    found = {"/server_info": (200, json.dumps(info)), "/v1/loads": (200, json.dumps({"loads": [LOAD] * len(states)}))}
    return found if metrics is None else {**found, "/metrics": (200, metrics)}


@contextmanager
def serving(answers: Replies, key: str | None = None) -> Iterator[str]:
    """URL of a server with these replies; everything else is not found."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            is_allowed = key is None or self.headers["Authorization"] == f"Bearer {key}"
            status, text = answers.get(self.path, (404, "not found")) if is_allowed else (401, "no")
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def look(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Status, output and errors of one look."""

    def run(url: str, *options: str) -> tuple[int, str, str]:
        status = main(["top", "--url", url, "--once", *options])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


Look = Callable[..., tuple[int, str, str]]


def test_replicas_are_added_up(look: Look) -> None:
    with serving(replies([{"hardkv": replica()}] * 2, METRICS)) as url:
        status, out, _ = look(url, "--json")
    assert status == 0
    seen = json.loads(out)
    assert (seen["running_requests"], seen["waiting_requests"], seen["tokens_per_second"]) == (6, 2, 25.0)
    assert (seen["used_tokens"], seen["pool_tokens"]) == (2048, 8192)
    assert (seen["output_pages"], seen["dense_output_pages"]) == (10, 12)
    assert seen["kept_ratio"] == pytest.approx(10 / 12)
    assert seen["kept_fraction"] == pytest.approx(0.25)
    assert (seen["select_events"], seen["early_events"], seen["postponed_events"], seen["freed_pages"]) == (8, 2, 6, 12)
    assert seen["retracted_requests"] == 3


def test_text_names_every_number(look: Look) -> None:
    with serving(replies([{"hardkv": replica()}], METRICS)) as url:
        status, out, _ = look(url + "/")
    assert status == 0
    for part in ("3 running, 1 waiting", "1024 of 4096 tokens, 25.0 %", "5 of 6 token pages, 83.3 % of dense"):
        assert part in out
    assert "25.0 % of the tokens" in out
    assert "3 requests retracted" in out
    assert "\x1b" not in out


def test_without_metrics_retractions_are_unknown(look: Look) -> None:
    with serving(replies([{"hardkv": replica()}])) as url:
        assert json.loads(look(url, "--json")[1])["retracted_requests"] is None
        assert "--enable-metrics" in look(url)[1]


def test_no_retraction_yet_is_none_retracted(look: Look) -> None:
    with serving(replies([{"hardkv": replica()}], "# nothing\n")) as url:
        assert json.loads(look(url, "--json")[1])["retracted_requests"] == 0


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (replies([{}]), "--kv-compression hardkv"),
        (replies([]), "--kv-compression hardkv"),
        ({}, "check --url"),
        ({"/server_info": (200, "<html>")}, "check --url"),
        ({"/server_info": (200, "[]")}, "check --url"),
    ],
)
def test_other_servers_are_named(look: Look, answers: Replies, message: str) -> None:
    with serving(answers) as url:
        status, out, err = look(url)
    assert (status, out) == (2, "")
    assert message in err
    assert url in err
    assert err.count("\n") == 1


def test_nothing_listens(look: Look) -> None:
    status, _, err = look("http://127.0.0.1:9")
    assert status == 2
    assert "cannot be reached" in err
    assert err.count("\n") == 1


def test_a_url_that_is_none(look: Look) -> None:
    assert look("localhost")[0] == 2


def test_key_is_sent(look: Look) -> None:
    with serving(replies([{"hardkv": replica()}]), key="secret") as url:
        assert "--api-key" in look(url)[2]
        assert look(url, "--api-key", "secret")[0] == 0


@pytest.mark.parametrize("interval", ["0", "-1", "nan", "inf", "soon"])
def test_interval_is_a_number_of_seconds(interval: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["top", "--url", "http://127.0.0.1:9", "--interval", interval])
    assert "--interval" in capsys.readouterr().err


def test_refreshed_until_the_server_ends(capsys: pytest.CaptureFixture[str]) -> None:
    answers = replies([{"hardkv": replica()}])
    with serving(answers) as url:
        timer = Timer(2.0, answers.clear)
        timer.start()
        assert main(["top", "--url", url, "--json", "--interval", "0.1"]) == 2
        timer.join()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 2
    assert all(json.loads(line)["running_requests"] == 3 for line in lines)


def test_sparkline_spans_zero_to_most() -> None:
    assert sparkline([0, 5, 10, 20], most=10, width=4) == BARS[0] + BARS[4] + BARS[7] + BARS[7]
    assert sparkline([1, 2, 3], most=3, width=2) == sparkline([2, 3], most=3, width=2)
    assert sparkline([3], most=0, width=2) == BARS[0]
