"""Requests that run on one prefix of the radix tree form groups."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from e2e.compressed import (
    FEWER_LAYERS,
    LOGPROB_TOLERANCE,
    PAGE,
    SHORT_INTERVALS,
    STRICT,
    compressed,
    fewer_layers,
    hardkv_state,
    output_logprobs,
    prefill_logprobs,
    prompt_ids,
)

from hardkv_sglang.cli.server_process import ServerProcess as Server

pytestmark = fewer_layers
GROUPING = compressed({**SHORT_INTERVALS, "min_shared_tokens": 2 * 96}, **FEWER_LAYERS)
SAMPLING = {"temperature": 0, "max_new_tokens": 200, "ignore_eos": True}


def test_a_prefix_of_several_running_requests_is_read_once(server_for: Callable[..., Server]) -> None:
    # on a GPU, that is; without one the same groups are found, and attended request by request
    server = server_for(GROUPING, STRICT)
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
        reference = prefill_logprobs(server, ids, len(prompt))
        assert output_logprobs(reply)[:exact] == pytest.approx(reference, abs=LOGPROB_TOLERANCE)
    server.check_idle()
