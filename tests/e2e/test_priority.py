"""Priorities with preemption: nobody is lost, and a newcomer throws out no more requests than it needs.

The servers run with SGLang's strict memory checks on every step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from e2e.compressed import STRICT, TINY, decode, fresh_rid, hardkv_state, prompt_ids, two_layers

from hardkv_sglang.cli.server_process import ServerProcess as Server

ServerFor = Callable[..., Server]
pytestmark = two_layers
MOST_RUNNING = 6
PRIORITIES = {**TINY, "enable-priority-scheduling": True, "max-running-requests": MOST_RUNNING}
TIMEOUT_S = 240
DENSE = {"custom_params": {"kv_compression": "none"}}
COMPRESSED: Mapping[str, Any] = {}


class Load:
    """Requests of low priority that fill the running batch, and what comes after them."""

    def __init__(self, server: Server, executor: ThreadPoolExecutor, sampling: Mapping[str, Any]) -> None:
        self.server = server
        self.executor = executor
        self.sampling = sampling
        self.replies: dict[str, Future[Any]] = {}

    def send(self, num_prompt: int, num_output: int, priority: int, seed: int) -> str:
        rid = fresh_rid()
        self.replies[rid] = self.executor.submit(
            decode, self.server, prompt_ids(num_prompt, seed), num_output,
            rid=rid, priority=priority, sampling=dict(self.sampling),
        )  # fmt: skip
        return rid

    def fill(self, num_output: int, seed: int) -> list[str]:
        """As many requests of priority 0 as may run, all of them decoding."""
        start = len(self.server.log_text())
        low = [self.send(40, num_output, 0, seed + i) for i in range(MOST_RUNNING)]
        deadline = time.monotonic() + TIMEOUT_S
        while f"Decode batch, #running-req: {MOST_RUNNING}," not in self.server.log_text()[start:]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return low

    def reply(self, rid: str) -> Any:
        return self.replies[rid].result(TIMEOUT_S)


def finish(reply: Any) -> str:
    return reply["meta_info"]["finish_reason"]["type"]


# Prompts that need the pages of some running requests, and of all: SGLang's own estimate, which leaves out the prompt
# of a request that it sees for the first time, and the forecast differ about how many
@pytest.mark.parametrize(("num_prompt", "num_output"), [(1200, 175), (2300, 200)])
@pytest.mark.parametrize("sampling", [DENSE, COMPRESSED], ids=["dense", "compressed"])
def test_nobody_is_lost(server_for: ServerFor, sampling: Mapping[str, Any], num_prompt: int, num_output: int) -> None:
    server = server_for(PRIORITIES, STRICT)
    server.flush_cache()
    with ThreadPoolExecutor(MOST_RUNNING + 1) as executor:
        load = Load(server, executor, sampling)
        low = load.fill(200, seed=910)
        high = load.send(num_prompt, num_output, 100, seed=980)
        replies = {rid: load.reply(rid) for rid in [high, *low]}
    assert [finish(reply) for reply in replies.values()] == ["length"] * 7
    assert len(replies[high]["output_ids"]) == num_output
    assert [len(replies[rid]["output_ids"]) for rid in low] == [200] * MOST_RUNNING
    assert replies[high]["meta_info"]["num_retractions"] == 0
    server.check_idle()


def test_preempted_requests_can_be_aborted(server_for: ServerFor) -> None:
    server = server_for(PRIORITIES, STRICT)
    server.flush_cache()
    with ThreadPoolExecutor(MOST_RUNNING + 1) as executor:
        load = Load(server, executor, DENSE)
        low = load.fill(350, seed=930)
        high = load.send(1200, 700, 100, seed=985)
        deadline = time.monotonic() + TIMEOUT_S
        while "#queue-req: 0," in server.log_text().rsplit("Decode batch", 1)[-1]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        for rid in low:
            server.abort(rid)
        assert [finish(load.reply(rid)) for rid in low] == ["abort"] * MOST_RUNNING
        assert finish(load.reply(high)) == "length"
    server.check_idle()


def test_a_newcomer_throws_out_no_more_than_it_needs(server_for: ServerFor) -> None:
    server = server_for(PRIORITIES, STRICT)
    server.flush_cache()
    with ThreadPoolExecutor(MOST_RUNNING + 1) as executor:
        load = Load(server, executor, COMPRESSED)
        before = hardkv_state(server)["condense_events"]
        low = load.fill(400, seed=950)
        deadline = time.monotonic() + TIMEOUT_S
        while hardkv_state(server)["condense_events"] < before + MOST_RUNNING:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        high = load.send(100, 700, 100, seed=990)
        replies = [load.reply(rid) for rid in low]
        assert len(load.reply(high)["output_ids"]) == 700
    assert [len(reply["output_ids"]) for reply in replies] == [400] * MOST_RUNNING
    # it takes the place of one; the memory of the others is not needed
    assert sum(reply["meta_info"]["num_retractions"] for reply in replies) == 1
    server.check_idle()
