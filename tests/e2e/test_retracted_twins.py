"""A retracted request whose prompt and first outputs another one has left in the radix tree."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import requests
from e2e.compressed import EXACT_OPTIONS, FEWER_LAYERS, STOCK, STRICT, compressed, decode, fewer_layers, prompt_ids

from hardkv_sglang.cli.server_process import ServerProcess as Server

ServerFor = Callable[..., Server]
pytestmark = fewer_layers
# events run and drop nothing: outputs are stock's
ALL_KEPT = compressed(EXACT_OPTIONS, **FEWER_LAYERS)
DENSE = {"custom_params": {"kv_compression": "none"}}
NUM_TOKENS = 150


def post(server: Server, path: str, body: dict[str, Any]) -> None:
    requests.post(f"{server.url}/{path}", json=body, timeout=60).raise_for_status()


def retract_at(server: Server, num_tokens: int, requests_in_flight: list[Future[Any]]) -> None:
    """Retract everything that runs once it holds so many tokens, prompts included."""
    deadline = time.monotonic() + 300
    while server_tokens(server) < num_tokens and not all(f.done() for f in requests_in_flight):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    post(server, "pause_generation", {"mode": "retract"})
    post(server, "continue_generation", {})


def server_tokens(server: Server) -> int:
    loads = requests.get(f"{server.url}/v1/loads", timeout=60).json()["loads"]
    return sum(load["num_total_tokens"] for load in loads)


@pytest.mark.parametrize("prompt_len", [31, 32, 33, 63])
def test_outputs_are_stocks(server_for: ServerFor, prompt_len: int) -> None:
    prompt = prompt_ids(prompt_len, seed=520 + prompt_len)
    expected = decode(server_for({**STOCK, **FEWER_LAYERS}, STRICT), prompt, NUM_TOKENS)["output_ids"]
    server = server_for(ALL_KEPT, STRICT)
    # a finished twin that was dense to its end: all of its output is in the tree
    assert decode(server, prompt, 70, sampling=DENSE)["output_ids"] == expected[:70]
    with ThreadPoolExecutor(4) as executor:
        running = [
            executor.submit(decode, server, prompt, NUM_TOKENS),
            executor.submit(decode, server, prompt, NUM_TOKENS, sampling=DENSE),
            executor.submit(decode, server, prompt, NUM_TOKENS, sampling={"n": 2}),
        ]
        # each about a hundred tokens long: past the first events
        retract_at(server, 4 * (prompt_len + 100), running)
        # and at once again, with the twins that have resumed beside the finished one
        retract_at(server, 4 * (prompt_len + 110), running)
        replies = [f.result() for f in running]
    flat = [*replies[:2], *replies[2]]
    assert [r["output_ids"] for r in flat] == [expected] * 4
    assert max(r["meta_info"]["num_retractions"] for r in flat) >= 1
    # what they left behind serves the next one, and every page has an owner
    assert decode(server, prompt, 40)["output_ids"] == expected[:40]
    server.check_idle()
