"""Every way in which a request can end leaves the pool whole.

The servers run with SGLang's strict memory checks on every step; a leak or a double free ends them.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from e2e.compressed import FAST, STRICT, decode, fewer_layers, fresh_rid, hardkv_state, prompt_ids

from hardkv_sglang.cli.server_process import ServerProcess as Server

ServerFor = Callable[..., Server]
pytestmark = fewer_layers
RETRACTING = {**STRICT, "SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "40"}


def wait_for_events(server: Server, num_events: int) -> None:
    """Return once that many more select events have run."""
    start, deadline = hardkv_state(server)["select_events"], time.monotonic() + 120
    while hardkv_state(server)["select_events"] < start + num_events:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_finish(server_for: ServerFor) -> None:
    server = server_for(FAST, STRICT)
    decode(server, prompt_ids(40, seed=60), 200)
    server.check_idle()


def test_abort_between_events(server_for: ServerFor) -> None:
    server, rid = server_for(FAST, STRICT), fresh_rid()
    with ThreadPoolExecutor(1) as executor:
        future = executor.submit(decode, server, prompt_ids(40, seed=62), 1500, rid=rid)
        wait_for_events(server, 4)
        server.abort(rid)
        assert future.result()["meta_info"]["finish_reason"]["type"] == "abort"
    server.check_idle()


def test_disconnect(server_for: ServerFor) -> None:
    server = server_for(FAST, STRICT)
    stream: Any = server.client().completions.create(
        model="default", prompt=prompt_ids(40, seed=63), max_tokens=1500, stream=True,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    pieces = iter(stream)
    for _ in range(150):
        next(pieces)
    stream.close()
    server.check_idle()


def test_flush_cache(server_for: ServerFor) -> None:
    server, prompt = server_for(FAST, STRICT), prompt_ids(64, seed=64)
    first = decode(server, prompt, 200)
    server.flush_cache()
    second = decode(server, prompt, 200)
    assert second["meta_info"]["cached_tokens"] == 0
    assert second["output_ids"] == first["output_ids"]


def test_retraction_resumes_and_compresses_again(server_for: ServerFor) -> None:
    server = server_for(FAST, RETRACTING)
    rids = [fresh_rid() for _ in range(3)]
    prompts = [prompt_ids(40, seed=65 + i) for i in range(3)]
    with ThreadPoolExecutor(3) as executor:
        replies = list(executor.map(lambda p, r: decode(server, p, 240, rid=r), prompts, rids))
    assert sum(r["meta_info"]["num_retractions"] for r in replies) >= 2
    assert all(len(r["output_ids"]) == 240 for r in replies)
    reports = [r for r in hardkv_state(server)["requests"] if r["rid"] in rids]
    retracted = [r["meta_info"]["num_retractions"] > 0 for r in replies]
    resumed = [rid for rid, was in zip(rids, retracted, strict=True) if was]
    assert any(r["rid"] in resumed and r["condense_events"] >= 1 for r in reports)
    server.check_idle()


def test_two_hundred_random_requests_with_random_aborts(server_for: ServerFor) -> None:
    # retracted at random as well
    server, rng = server_for(FAST, RETRACTING), random.Random(0)
    jobs = [(rng.randrange(1, 120), rng.choice((5, 20, 40, 90, 140)), rng.random() < 0.25) for _ in range(200)]

    def run(index: int) -> str:
        prompt_len, num_tokens, aborted = jobs[index]
        rid = fresh_rid()
        sampling = {"temperature": 0, "max_new_tokens": num_tokens, "ignore_eos": True}
        with ThreadPoolExecutor(1) as executor:
            # every third prompt is shared, so that the tree takes part
            ids = prompt_ids(prompt_len, seed=1000 + index % 67)
            future = executor.submit(server.generate, input_ids=ids, sampling_params=sampling, rid=rid)
            if aborted:
                time.sleep(rng.random())
                server.abort(rid)
            return future.result()["meta_info"]["finish_reason"]["type"]

    events = hardkv_state(server)["select_events"]
    with ThreadPoolExecutor(12) as executor:
        reasons = list(executor.map(run, range(len(jobs))))
    assert {"length", "abort"} == set(reasons)
    assert hardkv_state(server)["select_events"] > events
    server.check_idle()
