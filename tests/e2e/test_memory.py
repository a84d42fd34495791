"""Compression gives memory back while requests run, counted by SGLang's own allocator."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from e2e.compressed import (
    FAST,
    FEWER_LAYERS,
    POOL_TOKENS,
    STOCK,
    STRICT,
    decode,
    fewer_layers,
    fresh_rid,
    hardkv_state,
    prompt_ids,
    report_of,
)

from hardkv_sglang.cli.server_process import ServerProcess as Server

ServerFor = Callable[..., Server]
pytestmark = fewer_layers
FAST_STOCK = {**STOCK, **FEWER_LAYERS}


def test_eight_requests_fit_a_pool_that_dense_overflows(server_for: ServerFor) -> None:
    num_tokens, server = 440, server_for(FAST, STRICT)
    server.flush_cache()
    prompts = [prompt_ids(40, seed=20 + i) for i in range(8)]
    assert sum(len(p) + num_tokens for p in prompts) > 1.4 * POOL_TOKENS
    before = len(server.log_text())
    with ThreadPoolExecutor(8) as executor:
        replies = list(executor.map(lambda p: decode(server, p, num_tokens), prompts))
    assert [r["meta_info"]["num_retractions"] for r in replies] == [0] * 8
    running = [int(n) for n in re.findall(r"Decode batch, #running-req: (\d+)", server.log_text()[before:])]
    assert max(running) == 8
    server.check_idle()


def test_same_load_makes_stock_wait_or_retract(server_for: ServerFor) -> None:
    num_tokens, server = 440, server_for(FAST_STOCK, STRICT)
    server.flush_cache()
    prompts = [prompt_ids(40, seed=20 + i) for i in range(8)]
    before = len(server.log_text())
    with ThreadPoolExecutor(8) as executor:
        replies = list(executor.map(lambda p: decode(server, p, num_tokens), prompts))
    retracted = sum(r["meta_info"]["num_retractions"] for r in replies)
    running = [int(n) for n in re.findall(r"Decode batch, #running-req: (\d+)", server.log_text()[before:])]
    assert retracted > 0 or max(running) < 8


def test_freed_pages_are_counted_to_the_page(server_for: ServerFor) -> None:
    # strict mode compares, at every step, owned pages with sum(ceil(n / page)) over (layer, head) of the tables
    server, rid = server_for(FAST, STRICT), fresh_rid()
    before = hardkv_state(server)
    decode(server, prompt_ids(40, seed=30), 400, rid=rid)
    after, report = hardkv_state(server), report_of(server, rid)
    returned = (after["freed_pages"] - before["freed_pages"]) - (after["allocated_pages"] - before["allocated_pages"])
    assert returned == report["dense_pages"] - report["held_pages"]
    assert returned > 0
    assert 0 < after["kept_fraction"] < after["kept_mass"] < 1
    server.check_idle()
