"""Samples of one prompt that share pages up to a page boundary, or just not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from e2e.compressed import STRICT, TINY, check_exact_start, decode, hardkv_state, prompt_ids, two_layers

from hardkv_sglang.cli.server_process import ServerProcess as Server

ServerFor = Callable[..., Server]
pytestmark = two_layers


@pytest.mark.parametrize("prompt_len", [31, 32, 33, 63])
@pytest.mark.parametrize("temperature", [0, 1])
def test_four_samples_around_a_page_boundary(server_for: ServerFor, prompt_len: int, temperature: int) -> None:
    server, prompt, num_tokens = server_for(TINY, STRICT), prompt_ids(prompt_len, seed=500 + prompt_len), 200
    before = hardkv_state(server)["condense_events"]
    replies = decode(server, prompt, num_tokens, sampling={"n": 4, "temperature": temperature})
    assert [len(reply["output_ids"]) for reply in replies] == [num_tokens] * 4
    assert hardkv_state(server)["condense_events"] >= before + 4
    for reply in replies:
        check_exact_start(server, prompt, reply)
    server.check_idle()
