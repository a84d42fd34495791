"""A prompt that fills the pool, and answers whose parts lie on both sides of an event."""

from __future__ import annotations

import math
from collections.abc import Callable

import requests
from e2e.compressed import (
    PAGE,
    POOL_TOKENS,
    STRICT,
    TINY,
    check_exact_start,
    decode,
    hardkv_state,
    prompt_ids,
    two_layers,
)

from hardkv_sglang.cli.server_process import ServerProcess as Server

ServerFor = Callable[..., Server]
pytestmark = two_layers


def test_a_prompt_that_leaves_one_page(server_for: ServerFor) -> None:
    # more than the pool can hold is cut by SGLang, not by us: the request still gets an answer
    server = server_for(TINY, STRICT)
    reply = decode(server, prompt_ids(POOL_TOKENS - 40, seed=810), 200)
    assert reply["meta_info"]["finish_reason"]["type"] in ("length", "abort")
    server.check_idle()


def test_a_prompt_that_could_never_start(server_for: ServerFor) -> None:
    # stock SGLang lets it wait for ever, and everybody behind it
    server, num_tokens = server_for(TINY, STRICT), POOL_TOKENS - PAGE
    body = {"input_ids": prompt_ids(num_tokens, seed=815), "sampling_params": {"max_new_tokens": 4}}
    reply = requests.post(f"{server.url}/generate", json=body, timeout=120)
    assert reply.status_code == 400
    assert f"{num_tokens} tokens" in reply.text
    server.check_idle()


def test_logprobs_across_events(server_for: ServerFor) -> None:
    server, prompt, num_tokens = server_for(TINY, STRICT), prompt_ids(50, seed=820), 260
    before = hardkv_state(server)["condense_events"]
    reply = decode(
        server, prompt, num_tokens, logprob_start_len=0, top_logprobs_num=3, token_ids_logprob=[5, 7],
        return_text_in_logprobs=True,
    )  # fmt: skip
    meta = reply["meta_info"]
    assert hardkv_state(server)["condense_events"] > before
    assert len(meta["input_token_logprobs"]) == len(prompt)
    for entry, top, chosen in zip(
        meta["output_token_logprobs"], meta["output_top_logprobs"], meta["output_token_ids_logprobs"], strict=True
    ):
        assert entry[0] == max(value for value, *_ in top)  # greedy
        assert all(math.isfinite(value) and value <= 0 for value, *_ in (*top, *chosen))
        assert [token for _, token, *_ in chosen] == [5, 7]
    assert [entry[1] for entry in meta["output_token_logprobs"]] == reply["output_ids"]
    check_exact_start(server, prompt, reply)
