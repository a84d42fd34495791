"""Shared prefixes stay in the radix tree, and only exact KV ever enters it."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from e2e.compressed import (
    LOGPROB_TOLERANCE,
    PAGE,
    SHORT,
    SHORT_INTERVALS,
    STOCK,
    STRICT,
    compressed,
    decode,
    fresh_rid,
    hardkv_state,
    output_logprobs,
    page_ceil,
    prefill_logprobs,
    prompt_ids,
    report_of,
)

from hardkv_sglang.server_process import ServerProcess as Server

ServerFor = Callable[..., Server]
SAMPLING = {"temperature": 0, "max_new_tokens": 200, "ignore_eos": True}


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


def test_a_prefix_of_several_running_requests_is_read_once(server_for: ServerFor) -> None:
    # on a GPU, that is; without one the same groups are found, and attended request by request
    server = server_for(compressed({**SHORT_INTERVALS, "min_shared_tokens": 2 * 96}), STRICT)
    system = prompt_ids(100, seed=48)
    prompts = [system + prompt_ids(10 + i, seed=49 + i) for i in range(3)]
    server.flush_cache()
    with ThreadPoolExecutor(1) as executor:
        # prefilled together, so that the first decode step is launched before the tree has the prompt
        future = executor.submit(server.generate, input_ids=prompts, sampling_params=SAMPLING, return_logprob=True)
        seen = []
        while not future.done():
            seen.append(hardkv_state(server)["shared_prefixes"])
            time.sleep(0.05)
    assert [{"tokens": 96, "requests": 3}] in seen
    for prompt, reply in zip(prompts, future.result(), strict=True):
        # dense until the first event
        exact = PAGE + 1
        ids = prompt + reply["output_ids"][:exact]
        reference = prefill_logprobs(server_for(STOCK, STRICT), ids, len(prompt))
        assert output_logprobs(reply)[:exact] == pytest.approx(reference, abs=LOGPROB_TOLERANCE)
    server.check_idle()
