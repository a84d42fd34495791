"""Data-parallel replicas: each compresses its own requests."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from e2e.compressed import (
    SHORT_INTERVALS,
    STRICT,
    TWO_LAYERS,
    check_exact_start,
    compressed,
    decode,
    fresh_rid,
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


def blocks_of(server: Server) -> list[dict[str, Any]]:
    """The `hardkv` block of each replica."""
    return [state["hardkv"] for state in server.server_info()["internal_states"]]


def test_both_replicas_compress(server_for: Callable[..., Server]) -> None:
    server, num_tokens = server_for(REPLICAS, STRICT), 300
    # clients with one prompt may meet on one replica or on two, whose trees know nothing of each other
    jobs = [(prompt_ids(PROMPT_LEN, seed=950 + i // 2), fresh_rid()) for i in range(6)]
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
        assert report["condense_events"] >= 2
        assert report["held_pages"] < report["dense_pages"]
    server.check_idle()
