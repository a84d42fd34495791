"""What compression must not change: everything before the first event, and everything at p = 1."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from e2e.compressed import (
    FIRST_EVENT,
    SHORT,
    SHORT_INTERVALS,
    STOCK,
    STRICT,
    compressed,
    decode,
    hardkv_state,
    output_logprobs,
    page_ceil,
    prompt_ids,
    whole_model,
)

from hardkv_sglang.cli.server_process import ServerProcess as Server

ServerFor = Callable[..., Server]
pytestmark = whole_model


@pytest.mark.parametrize("prompt_len", [1, 31, 32, 33, 300])
def test_identical_until_the_first_event(server_for: ServerFor, prompt_len: int) -> None:
    prompt = prompt_ids(prompt_len, seed=prompt_len)
    exact = page_ceil(prompt_len) - prompt_len + FIRST_EVENT
    stock = decode(server_for(STOCK, STRICT), prompt, exact + 40)
    ours = decode(server_for(SHORT, STRICT), prompt, exact + 40)
    assert ours["output_ids"][:exact] == stock["output_ids"][:exact]
    assert output_logprobs(ours)[:exact] == output_logprobs(stock)[:exact]
    # and the event did something, so that the comparison above is about its absence
    assert output_logprobs(ours)[exact:] != output_logprobs(stock)[exact:]


def test_short_requests_are_identical(server_for: ServerFor) -> None:
    prompt = prompt_ids(50, seed=2)
    stock = decode(server_for(STOCK, STRICT), prompt, 60)
    ours = decode(server_for(SHORT, STRICT), prompt, 60)
    assert ours["output_ids"] == stock["output_ids"]
    assert output_logprobs(ours) == output_logprobs(stock)


def test_opted_out_request_is_identical(server_for: ServerFor) -> None:
    prompt = prompt_ids(50, seed=3)
    stock = decode(server_for(STOCK, STRICT), prompt, 160)
    dense = {"custom_params": {"kv_compression": "none"}}
    ours = decode(server_for(SHORT, STRICT), prompt, 160, sampling=dense)
    assert ours["output_ids"] == stock["output_ids"]
    assert output_logprobs(ours) == output_logprobs(stock)


@pytest.mark.gpu
def test_deterministic_runs_have_the_same_bits(server_for: ServerFor) -> None:
    server = server_for(compressed(SHORT_INTERVALS, **{"enable-deterministic-inference": True}), STRICT)
    prompts = [prompt_ids(40 + i, seed=6 + i) for i in range(2)]
    sampling = {"temperature": 0, "max_new_tokens": 300, "ignore_eos": True}
    runs = []
    for _ in range(2):
        server.flush_cache()
        replies = server.generate(input_ids=prompts, sampling_params=sampling, return_logprob=True)
        runs.append([output_logprobs(reply) for reply in replies])
    assert runs[0] == runs[1]
    assert hardkv_state(server)["condense_events"] >= 4
