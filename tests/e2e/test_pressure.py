"""A pool that is too small: relief gives pages back before SGLang retracts, with and without a radix tree."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from e2e.compressed import (
    FEWER_LAYERS,
    POOL_TOKENS,
    SHORT_INTERVALS,
    STRICT,
    compressed,
    decode,
    fewer_layers,
    hardkv_state,
    prompt_ids,
)

from hardkv_sglang.cli.server_process import ServerProcess as Server

ServerFor = Callable[..., Server]
pytestmark = fewer_layers
NO_TREE = compressed(SHORT_INTERVALS, **FEWER_LAYERS, **{"disable-radix-cache": True})


def decode_all(server: Server, num_requests: int, num_tokens: int, seed: int, **sampling: Any) -> list[Any]:
    prompts = [prompt_ids(40, seed=seed + i) for i in range(num_requests)]
    with ThreadPoolExecutor(num_requests) as executor:
        return list(executor.map(lambda p: decode(server, p, num_tokens, sampling=sampling), prompts))


def test_long_outputs_after_short_ones_are_relieved(server_for: ServerFor) -> None:
    server, num_tokens = server_for(NO_TREE, STRICT), 440
    decode_all(server, 8, 1, seed=300)
    before = hardkv_state(server)
    # the server has seen outputs of one token only, and nobody tells it how long these will be
    replies = decode_all(server, 10, num_tokens, seed=310, ignore_eos=False, min_new_tokens=num_tokens)
    after = hardkv_state(server)
    assert [len(r["output_ids"]) for r in replies] == [num_tokens] * 10
    assert sum(r["meta_info"]["prompt_tokens"] + num_tokens for r in replies) > 1.7 * POOL_TOKENS
    assert after["early_events"] > before["early_events"]
    assert sum(r["meta_info"]["num_retractions"] for r in replies) <= 1
    server.check_idle()


def test_known_lengths_are_admitted_by_footprint(server_for: ServerFor) -> None:
    server = server_for(NO_TREE, STRICT)
    before = len(server.log_text())
    replies = decode_all(server, 8, 440, seed=330)
    assert [r["meta_info"]["num_retractions"] for r in replies] == [0] * 8
    running = [int(n) for n in re.findall(r"Decode batch, #running-req: (\d+)", server.log_text()[before:])]
    # dense, five of them fill the pool
    assert max(running) >= 7
    server.check_idle()
