"""An operator who flushes, pauses, updates weights and gives memory back beside compressed requests."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
from e2e.compressed import STRICT, TINY, check_exact_start, decode, hardkv_state, prompt_ids, two_layers
from e2e.server import ServerPool

from hardkv_sglang.cli.server_process import ServerProcess as Server

pytestmark = two_layers
NUM_TOKENS = 230  # six select events, three condense events
FEW_TOKENS = 100  # one condense event
PROMPT = prompt_ids(31, seed=900)  # less than a page: never cached, so every answer is computed in the same way
EVENTS = ("select_events", "condense_events")
TIMEOUT_S = 120.0


@pytest.fixture
def server(server_for: Callable[..., Server]) -> Iterator[Server]:
    server = server_for(TINY, STRICT)
    yield server
    server.check_idle()


@pytest.fixture(scope="module")
def undisturbed(server_pool: ServerPool) -> list[int]:
    """What the prompt is answered with when no operator interferes."""
    tokens: list[int] = decode(server_pool.get(TINY, STRICT), PROMPT, NUM_TOKENS)["output_ids"]
    return tokens


def check_answer(server: Server, undisturbed: list[int]) -> None:
    """The server still says the same."""
    assert decode(server, PROMPT, FEW_TOKENS)["output_ids"] == undisturbed[:FEW_TOKENS]


def post(server: Server, path: str, expected: int = 200, **body: Any) -> str:
    reply = requests.post(server.url + path, json=body, timeout=TIMEOUT_S)
    assert reply.status_code == expected, reply.text
    return reply.text


@contextmanager
def paused(server: Server, mode: str) -> Iterator[None]:
    post(server, "/pause_generation", mode=mode)
    yield
    post(server, "/continue_generation")


def wait_for_event(server: Server, name: str, before: int) -> None:
    """Return when more than `before` events of this name have run."""
    deadline = time.monotonic() + TIMEOUT_S
    while hardkv_state(server)[name] <= before:
        assert time.monotonic() < deadline


@contextmanager
def in_flight(server: Server) -> Iterator[Future[Any]]:
    """A request that has had its first condense event."""
    before = hardkv_state(server)["condense_events"]
    with ThreadPoolExecutor(1) as executor:
        future = executor.submit(decode, server, PROMPT, NUM_TOKENS)
        wait_for_event(server, "condense_events", before)
        assert not future.done()
        yield future


def update_weights(server: Server, model: Path, **options: Any) -> None:
    """The same weights once more, without a flush: while a step is still under way, SGLang ends itself when it shall
    flush, also after the answer to the last request was sent."""
    body = {"model_path": str(model), "flush_cache": False, **options}
    assert '"success":true' in post(server, "/update_weights_from_disk", **body)


def test_the_cache_is_not_flushed_under_a_request(server: Server, undisturbed: list[int]) -> None:
    with in_flight(server) as future:
        refused = 0
        while (status := requests.post(f"{server.url}/flush_cache", timeout=TIMEOUT_S).status_code) == 400:
            refused += 1
            time.sleep(0.05)
        assert future.result()["output_ids"] == undisturbed
    assert status == 200
    assert refused > 3
    check_answer(server, undisturbed)


def test_pauses_between_all_steps(server: Server, undisturbed: list[int]) -> None:
    before, pauses = hardkv_state(server), 0
    with ThreadPoolExecutor(1) as executor:
        future = executor.submit(decode, server, PROMPT, NUM_TOKENS)
        while not future.done():
            with paused(server, "in_place"):
                pauses += 1
        assert future.result()["output_ids"] == undisturbed
    after = hardkv_state(server)
    assert all(after[name] >= before[name] + 3 for name in EVENTS)
    assert pauses > NUM_TOKENS / 2, "too few for the name of this test"


def test_retracted_at_every_stage(server: Server, demo_model: Path) -> None:
    before = hardkv_state(server)
    with ThreadPoolExecutor(1) as executor:
        future = executor.submit(decode, server, PROMPT, NUM_TOKENS)
        time.sleep(0.2)  # dense, or still queued
        for stage in (None, *EVENTS, *EVENTS):
            if stage is not None:  # each is the first since the last retraction
                wait_for_event(server, stage, before[stage])
            with paused(server, "retract"):
                assert not future.done()
                before = hardkv_state(server)
                if stage == "condense_events":
                    update_weights(server, demo_model)
        reply = future.result()
    assert len(reply["output_ids"]) == NUM_TOKENS
    assert reply["meta_info"]["num_retractions"] >= 4
    check_exact_start(server, PROMPT, reply)


def test_paused_in_place_for_new_weights(server: Server, demo_model: Path, undisturbed: list[int]) -> None:
    with in_flight(server) as future:
        with paused(server, "in_place"):
            post(server, "/flush_cache", expected=400)
            update_weights(server, demo_model)
        assert future.result()["output_ids"] == undisturbed


def test_new_weights_wait_for_a_request(server: Server, demo_model: Path, undisturbed: list[int]) -> None:
    with in_flight(server) as future:
        update_weights(server, demo_model)
        assert future.result()["output_ids"] == undisturbed
    check_answer(server, undisturbed)


@pytest.mark.parametrize("by", ["pause", "update"])
def test_all_requests_are_aborted(server: Server, demo_model: Path, undisturbed: list[int], by: str) -> None:
    with in_flight(server) as future:
        if by == "pause":
            with paused(server, "abort"):
                assert future.result()["meta_info"]["finish_reason"]["type"] == "abort"
        else:
            update_weights(server, demo_model, abort_all_requests=True)
            assert future.result()["meta_info"]["finish_reason"]["type"] == "abort"
    check_answer(server, undisturbed)


def test_memory_is_released_between_requests(server: Server, undisturbed: list[int]) -> None:
    # with requests in the server SGLang ends itself: release_memory_occupation asserts that there are none
    for tags in (["kv_cache"], ["kv_cache", "weights"], None):
        server.check_idle()
        post(server, "/release_memory_occupation", tags=tags)
        post(server, "/resume_memory_occupation", tags=tags)
        check_answer(server, undisturbed)
