"""Shared prefixes stay in the radix tree, and only exact KV ever enters it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from e2e.compressed import (
    LOGPROB_TOLERANCE,
    PAGE,
    SHORT,
    STOCK,
    STRICT,
    decode,
    fresh_rid,
    output_logprobs,
    page_ceil,
    prefill_logprobs,
    prompt_ids,
    report_of,
    whole_model,
)

from hardkv_sglang.cli.server_process import ServerProcess as Server

ServerFor = Callable[..., Server]
pytestmark = whole_model


def test_shared_system_prompt_hits_the_cache(server_for: ServerFor) -> None:
    server, system = server_for(SHORT, STRICT), prompt_ids(100, seed=40)
    first = decode(server, system + prompt_ids(20, seed=41), 200)
    second = decode(server, system + prompt_ids(20, seed=42), 200)
    assert first["meta_info"]["cached_tokens"] == 0
    assert second["meta_info"]["cached_tokens"] == 100 // PAGE * PAGE


@pytest.mark.parametrize("prompt_len", [64, 75])
def test_next_turn_hits_exactly_the_exact_part(server_for: ServerFor, prompt_len: int) -> None:
    server, prompt, rid = server_for(SHORT, STRICT), prompt_ids(prompt_len, seed=43 + prompt_len), fresh_rid()
    answer = decode(server, prompt, 250, rid=rid)["output_ids"]
    assert report_of(server, rid)["condense_events"] >= 1
    turn = decode(server, prompt + answer + prompt_ids(20, seed=44), 8)
    assert turn["meta_info"]["cached_tokens"] == page_ceil(prompt_len)


def test_uncompressed_answer_is_cached_as_stock_does(server_for: ServerFor) -> None:
    prompt = prompt_ids(64, seed=45)
    cached = []
    for server in (server_for(STOCK, STRICT), server_for(SHORT, STRICT)):
        answer = decode(server, prompt, 60)["output_ids"]
        cached.append(decode(server, prompt + answer + [600, 700], 4)["meta_info"]["cached_tokens"])
    assert cached[0] == cached[1] == (64 + 60 - 1) // PAGE * PAGE


def test_nothing_approximate_is_served_from_the_tree(server_for: ServerFor) -> None:
    # so little is kept that KV computed after the first event is far from exact: it would show
    server, prompt = server_for(SHORT, STRICT), prompt_ids(75, seed=46)
    reply = decode(server, prompt, 300)
    ids = prompt + reply["output_ids"]
    reference = prefill_logprobs(server_for(STOCK, STRICT), ids, len(prompt))
    assert max(abs(a - b) for a, b in zip(output_logprobs(reply), reference, strict=True)) > 0.05
    # served on top of whatever the first request left in the tree
    turn = decode(server, [*ids, 600, 700], 60)
    assert turn["meta_info"]["cached_tokens"] == page_ceil(75)
    exact = prefill_logprobs(server_for(STOCK, STRICT), [*ids, 600, 700, *turn["output_ids"]], len(ids) + 2)
    assert output_logprobs(turn) == pytest.approx(exact, abs=LOGPROB_TOLERANCE)


def test_chunked_prefill(server_for: ServerFor) -> None:
    # 128 tokens a chunk: five chunks, then enough tokens for several events
    server, rid, prompt = server_for(SHORT, STRICT), fresh_rid(), prompt_ids(600, seed=47)
    ours, stock = decode(server, prompt, 250, rid=rid), decode(server_for(STOCK, STRICT), prompt, 60)
    assert ours["output_ids"][:60] == stock["output_ids"]
    assert report_of(server, rid)["condense_events"] >= 1
    server.check_idle()
