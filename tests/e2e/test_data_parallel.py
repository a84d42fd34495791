"""Data-parallel replicas, each with a small pool of its own: both compress, and outputs as large as a pool end."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests
import torch
from e2e.compressed import (
    PAGE,
    SHORT_INTERVALS,
    STRICT,
    TWO_LAYERS,
    check_exact_start,
    compressed,
    decode,
    fresh_rid,
    page_ceil,
    prompt_ids,
    two_layers,
)

from hardkv_sglang.cli.server_process import ServerProcess as Server

pytestmark = [two_layers, pytest.mark.skipif(torch.cuda.device_count() == 1, reason="needs several GPUs, or none")]
NUM_REPLICAS, POOL_TOKENS = 2, 512
# so much is kept that a few requests fill a pool
OPTIONS = {**SHORT_INTERVALS, "min_tokens": 160}
REPLICAS = compressed(OPTIONS, **TWO_LAYERS, **{"dp-size": NUM_REPLICAS, "max-total-tokens": POOL_TOKENS})
PROMPT_LEN = 40
TIMEOUT_S = 240.0
MOST_TOKENS = POOL_TOKENS - page_ceil(PROMPT_LEN) - PAGE - 1  # that SGLang lets a request of this pool generate


def blocks_of(server: Server) -> list[dict[str, Any]]:
    """The `hardkv` block of each replica."""
    return [state["hardkv"] for state in server.server_info()["internal_states"]]


def condense_events(server: Server) -> list[int]:
    return [block["condense_events"] for block in blocks_of(server)]


def test_both_replicas_compress(server_for: Callable[..., Server]) -> None:
    server, num_tokens = server_for(REPLICAS, STRICT), 200
    # clients with one prompt may meet on one replica or on two, whose trees know nothing of each other
    jobs = [(prompt_ids(PROMPT_LEN, seed=950 + i // 2), fresh_rid()) for i in range(4)]
    with ThreadPoolExecutor(len(jobs)) as executor:
        replies = list(executor.map(lambda job: decode(server, job[0], num_tokens, rid=job[1]), jobs))
    for (prompt, _), reply in zip(jobs, replies, strict=True):
        assert len(reply["output_ids"]) == num_tokens
        check_exact_start(server, prompt, reply)
    reports = [{report["rid"]: report for report in block["requests"]} for block in blocks_of(server)]
    assert len(reports) == NUM_REPLICAS
    assert all(reports), "one replica served all"
    assert sorted(rid for by_rid in reports for rid in by_rid) == sorted(rid for _, rid in jobs)
    for report in (report for by_rid in reports for report in by_rid.values()):
        assert report["condense_events"] >= 1
        assert report["held_pages"] < report["dense_pages"]
    server.check_idle()


def test_outputs_as_large_as_a_pool(server_for: Callable[..., Server]) -> None:
    server = server_for(REPLICAS, STRICT)
    prompts = [prompt_ids(PROMPT_LEN, seed=800 + i) for i in range(3 * NUM_REPLICAS)]
    before = condense_events(server)
    with ThreadPoolExecutor(len(prompts)) as executor:
        futures = [executor.submit(decode, server, prompt, MOST_TOKENS) for prompt in prompts]
        deadline = time.monotonic() + TIMEOUT_S
        while any(now < then + 4 for now, then in zip(condense_events(server), before, strict=True)):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        # those that run come back, and need all at once what they have filled little by little
        for path, body in (("pause", {"mode": "retract"}), ("continue", {})):
            requests.post(f"{server.url}/{path}_generation", json=body, timeout=TIMEOUT_S).raise_for_status()
        replies = [future.result() for future in futures]
    for prompt, reply in zip(prompts, replies, strict=True):
        assert len(reply["output_ids"]) == MOST_TOKENS
        check_exact_start(server, prompt, reply)
    assert sum(reply["meta_info"]["num_retractions"] for reply in replies) >= NUM_REPLICAS
    server.check_idle()
