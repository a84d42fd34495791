"""What a decode step without events does not do on a GPU: wait for the device, or allocate memory on it."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from e2e.compressed import STOCK, compressed, decode, hardkv_state, prompt_ids

from bench.serving.step_trace import StepTrace, profile_steps
from hardkv_sglang.cli.server_process import ServerProcess as Server

STEPS, REQUESTS = 80, 4
# with these options queries are recorded from position 320 on, which the trace covers, and the first event comes at 576
OPTIONS = {"recent_tokens": 256, "query_window": 256, "select_interval": 256, "condense_interval": 256}
PROMPT, TOKENS, LINES_BEFORE = 40, 500, 5  # a log line every 40 steps


def trace_decode(server: Server, folder: Path) -> StepTrace:
    """Trace of some steps in which all requests decode; a first run of them warms up."""
    with ThreadPoolExecutor(REQUESTS) as executor:
        for _ in range(2):
            before = len(server.log_text())
            futures = [executor.submit(decode, server, prompt_ids(PROMPT, seed=i), TOKENS) for i in range(REQUESTS)]
            line = f"Decode batch, #running-req: {REQUESTS},"
            while server.log_text()[before:].count(line) < LINES_BEFORE:
                assert not any(future.done() for future in futures), "the requests never ran together"
                time.sleep(0.01)
            trace = profile_steps(server, STEPS, folder)
            for future in futures:
                future.result()
    return trace


@pytest.mark.gpu
def test_steps_without_events_neither_wait_nor_allocate(server_for: Callable[..., Server], tmp_path: Path) -> None:
    ours = server_for(compressed(OPTIONS))
    trace = trace_decode(ours, tmp_path / "ours")
    assert hardkv_state(ours)["select_events"] == 0
    assert trace.steps >= STEPS // 2, "no captured steps in the trace"
    assert trace.groups_us["ragged_decode"] > 0
    assert trace.groups_us["finish"] > 0
    assert trace.allocations() == 0, trace.host_calls
    stock = trace_decode(server_for(STOCK), tmp_path / "stock")
    assert trace.waits() / trace.steps <= stock.waits() / stock.steps, (trace.host_calls, stock.host_calls)
