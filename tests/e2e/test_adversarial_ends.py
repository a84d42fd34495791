"""Requests that end at every stage of their life: queued, in a chunk of their prefill, and around each event."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests
from e2e.compressed import FIRST_EVENT, PAGE, STRICT, TINY, decode, fresh_rid, hardkv_state, prompt_ids, two_layers

from hardkv_sglang.cli.server_process import ServerProcess as Server

ServerFor = Callable[..., Server]
pytestmark = two_layers
LONG_PROMPT = 2300  # tokens
PROMPT_LEN = 2 * PAGE  # no partial page: token n of the output is n tokens past the dense prefix
FIRST_CONDENSE = FIRST_EVENT + PAGE  # 64 sparse tokens, which the second select event completes
ENDLESS = {"temperature": 0, "max_new_tokens": 1500, "ignore_eos": True}
# ends reach the scheduler some steps later, so each stage is met by several of them
STAGES = [
    1,
    40,
    *range(FIRST_EVENT - 6, FIRST_EVENT + 4),
    *range(FIRST_CONDENSE - 6, FIRST_CONDENSE + 4),
    128,
    160,
    200,
]


def stream(server: Server, prompt: list[int], rid: str) -> requests.Response:
    body = {"input_ids": prompt, "sampling_params": ENDLESS, "rid": rid, "stream": True}
    return requests.post(f"{server.url}/generate", json=body, stream=True, timeout=600)


def pieces(reply: requests.Response) -> Iterator[Any]:
    for line in reply.iter_lines():
        if line.startswith(b"data: {"):
            yield json.loads(line.removeprefix(b"data: "))


def end_at(server: Server, num_tokens: int, leave: str) -> None:
    """End a request when that many of its tokens have arrived."""
    rid = fresh_rid()
    with stream(server, prompt_ids(PROMPT_LEN, seed=600 + num_tokens), rid) as reply:
        last = None
        for last in pieces(reply):
            if last["meta_info"]["completion_tokens"] < num_tokens:
                continue
            if leave == "disconnect":
                return
            server.abort(rid)
    assert last is not None
    assert last["meta_info"]["finish_reason"]["type"] == "abort"


@pytest.mark.parametrize("leave", ["abort", "disconnect"])
def test_ends_around_every_event(server_for: ServerFor, leave: str) -> None:
    server = server_for(TINY, STRICT)
    before = hardkv_state(server)
    with ThreadPoolExecutor(4) as executor:
        list(executor.map(lambda num_tokens: end_at(server, num_tokens, leave), STAGES))
    after = hardkv_state(server)
    assert after["select_events"] > before["select_events"]
    assert after["condense_events"] > before["condense_events"]
    server.check_idle()


def end_after(server: Server, index: int, leave: str) -> Any:
    """End a request a moment after it was sent; the last piece of its answer if it waits for one."""
    rid = fresh_rid()
    with stream(server, prompt_ids(LONG_PROMPT, seed=700 + index), rid) as reply:
        time.sleep(0.15 * (index + 1))
        if leave == "disconnect":
            return None
        server.abort(rid)
        return list(pieces(reply))[-1]


@pytest.mark.parametrize("leave", ["abort", "disconnect"])
def test_ends_in_the_queue_and_in_chunked_prefills(server_for: ServerFor, leave: str) -> None:
    # the pool takes one of these prompts at a time: the others wait, and each is computed in 18 chunks
    server, num_requests = server_for(TINY, STRICT), 6
    with ThreadPoolExecutor(num_requests) as executor:
        last = list(executor.map(lambda index: end_after(server, index, leave), range(num_requests)))
    if leave == "abort":
        assert [piece["meta_info"]["finish_reason"]["type"] for piece in last] == ["abort"] * num_requests
    server.check_idle()
    assert len(decode(server, prompt_ids(LONG_PROMPT, seed=710), 100)["output_ids"]) == 100
