"""The checks of the soak can fail."""

from __future__ import annotations

import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from bench.soak.__main__ import parse_arguments, parse_flags
from bench.soak.client import AbortedError, Client, SoakError, refusal
from bench.soak.kinds import KINDS
from bench.soak.load import MAX_FAILURES, Load, Record
from bench.soak.readings import differences
from bench.soak.verdict import GROWTH_BYTES, check_memory, check_requests


def test_a_lost_request_and_a_failure_are_seen() -> None:
    assert check_requests(Record(), 0).holds
    assert not check_requests(Record(), 1).holds
    record = Record()
    record.fail("plain", SoakError("not 5 tokens"), Client("http://nobody"))
    assert not check_requests(record, 0).holds


class Refusing(BaseHTTPRequestHandler):
    """A server that answers every request with an error."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.send_error(503, "too much")

    def log_message(self, *_args: object) -> None:
        """Nothing."""


def test_a_failure_says_what_was_sent_and_what_came_back() -> None:
    server = HTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    kinds = [kind for kind in KINDS if kind.name == "plain"]
    load = Load(url, kinds, 1, max_prompt=5, max_output=7, seed=0, deadline=time.monotonic() + 2)
    for thread in load.start():
        thread.join(60)
    server.shutdown()
    server.server_close()
    assert len(load.record.failures) >= MAX_FAILURES
    failure = next(failure for failure in load.record.failures if failure.kind == "plain")
    assert (failure.error, failure.status, failure.path) == ("SoakError", 503, "/generate")
    assert "too much" in failure.message
    assert set(failure.parameters) == {"input_ids", "sampling_params"}


def test_growth_between_the_quarters_is_seen() -> None:
    flat, bound = 1000 << 20, int((1000 << 20) * 1.05) + GROWTH_BYTES
    # what happens in the first quarter is warm-up
    assert check_memory([1, flat, flat, bound]).holds
    assert not check_memory([1, flat, flat, bound + (1 << 20)]).holds
    assert not check_memory([]).holds


def test_counters_that_disagree_are_named() -> None:
    assert differences({"a": 1.0, "b": 2.0}, {"a": 1.0 + 1e-9, "b": 2.0, "gauge": 7.0}) == []
    assert "b" in differences({"a": 1.0, "b": 2.0}, {"a": 1.0, "b": 3.0})[0]


def test_an_abort_is_told_from_an_error() -> None:
    assert isinstance(refusal("/generate", 499, '{"error":{"message":"Request 1f was aborted"}}'), AbortedError)
    error = refusal("/generate", 500, "Internal Server Error")
    assert isinstance(error, SoakError)
    assert not isinstance(error, AbortedError)


def test_flags_of_the_server_follow_two_dashes() -> None:
    args = parse_arguments(
        ["--minutes", "1", "--", "--load-format", "dummy", "--disable-overlap-schedule", "--tp-size=2"]
    )
    assert args.minutes == 1
    assert args.server_flags == {"load-format": "dummy", "disable-overlap-schedule": True, "tp-size": "2"}
    with pytest.raises(ValueError, match="stray"):
        parse_flags(["stray"])
