"""What compression must not change: everything before the first event, and everything at p = 1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from e2e.compressed import (
    EXACT,
    FIRST_EVENT,
    LOGPROB_TOLERANCE,
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


def prefill_differences(server: Server, prompt: list[int], reply: Any) -> list[float]:
    """How far the log-probability of each generated token is from that of the server's own prefill."""
    dense = prefill_logprobs(server, prompt + reply["output_ids"], len(prompt))
    return [abs(a - b) for a, b in zip(output_logprobs(reply), dense, strict=True)]


def test_p_one_equals_dense(server_for: ServerFor) -> None:
    server, rid, prompt = server_for(EXACT, STRICT), fresh_rid(), prompt_ids(45, seed=4)
    reply = decode(server, prompt, 420, rid=rid)
    report = report_of(server, rid)
    assert report["select_events"] >= 3
    assert report["condense_events"] >= 2
    assert report["kept_p10"] == report["kept_max"]
    allowed = LOGPROB_TOLERANCE
    if torch.cuda.is_available():
        # 16 bits: stock's decode and prefill differ as well, and every tier adds a rounding
        stock = server_for(STOCK, STRICT)
        allowed = 1.5 * max(prefill_differences(stock, prompt, decode(stock, prompt, 420)))
    assert max(prefill_differences(server, prompt, reply)) <= allowed


def test_overlap_on_and_off_agree(server_for: ServerFor) -> None:
    prompt = prompt_ids(70, seed=5)
    serial = compressed(SHORT_INTERVALS, **{"disable-overlap-schedule": True})
    overlapped, normal = server_for(SHORT, STRICT), server_for(serial, STRICT)
    rid = fresh_rid()
    first, second = decode(overlapped, prompt, 300, rid=rid), decode(normal, prompt, 300, rid=rid)
    assert first["output_ids"] == second["output_ids"]
    assert output_logprobs(first) == output_logprobs(second)
    assert report_of(overlapped, rid) == report_of(normal, rid)
    assert report_of(normal, rid)["condense_events"] >= 2


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
