"""The checks of the soak can fail."""

from __future__ import annotations

import pytest

from bench.soak.__main__ import parse_arguments, parse_flags
from bench.soak.client import AbortedError, SoakError, refusal
from bench.soak.load import Record
from bench.soak.readings import differences
from bench.soak.verdict import GROWTH_BYTES, check_memory, check_requests


def test_a_lost_request_and_a_failure_are_seen() -> None:
    assert check_requests(Record(), 0).holds
    assert not check_requests(Record(), 1).holds
    record = Record()
    record.fail("plain: not 5 tokens")
    assert not check_requests(record, 0).holds


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
