"""Prometheus series and the decode log line of a real server."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import requests
from e2e.compressed import FAST, LOG_INTERVAL, PAGE, STRICT, decode, fewer_layers, hardkv_state, page_ceil, prompt_ids
from prometheus_client.parser import text_string_to_metric_families

from hardkv_sglang.cli.server_process import ServerProcess as Server
from hardkv_sglang.observability.metrics import COUNTERS, GAUGES

pytestmark = fewer_layers
Samples = dict[str, list[tuple[dict[str, str], float]]]
PROMPT = 40
NEW_TOKENS = 240


@pytest.fixture
def server(server_for: Callable[..., Server]) -> Server:
    return server_for(FAST, STRICT)


def scrape(server: Server) -> Samples:
    """Samples of `/metrics` by name."""
    samples: Samples = {}
    for family in text_string_to_metric_families(requests.get(f"{server.url}/metrics", timeout=60).text):
        for sample in family.samples:
            samples.setdefault(sample.name, []).append((sample.labels, sample.value))
    return samples


def once_published(server: Server) -> tuple[Samples, dict[str, Any]]:
    """Samples and `/server_info` of an idle server that has published the time of its last step.

    With the overlap scheduler that step, planned for a request that turns out to have ended, comes after the reply.
    """
    deadline = time.monotonic() + 10
    while True:
        state, samples = hardkv_state(server), scrape(server)
        if samples["hardkv_event_seconds_total"][0][1] == pytest.approx(state["event_seconds"]):
            return samples, state
        assert time.monotonic() < deadline, (samples["hardkv_event_seconds_total"], state["event_seconds"])
        time.sleep(0.1)


def while_running(server: Server, running: Future[Any]) -> list[dict[str, float]]:
    """Gauges as seen during a request."""
    seen = []
    while not running.done():
        samples = scrape(server)
        seen.append({s.name: samples[s.name][0][1] for s in GAUGES})
        time.sleep(1)
    return seen


def test_series_agree_with_server_info_and_the_log(server: Server) -> None:
    log_start = len(server.log_text())
    with ThreadPoolExecutor(1) as executor:
        running = executor.submit(decode, server, prompt_ids(PROMPT, seed=300), NEW_TOKENS)
        seen = while_running(server, running)
    server.check_idle()
    samples, state = once_published(server)

    ((stock_labels, _),) = samples["sglang:num_used_tokens"]
    for series in (*COUNTERS, *GAUGES):
        ((labels, value),) = samples[series.name]
        assert labels == stock_labels
        source = state if series in COUNTERS else state["running"]
        assert value == pytest.approx(source[series.source]), series.name
    assert samples["hardkv_condense_events_total"][0][1] >= 2
    assert samples["hardkv_freed_pages_total"][0][1] > samples["hardkv_allocated_pages_total"][0][1] > 0
    assert samples["hardkv_event_seconds_total"][0][1] > 0

    condensed = [gauges for gauges in seen if gauges["hardkv_condensed_pages"] > 0]
    assert condensed
    most = -(-(PROMPT + NEW_TOKENS - page_ceil(PROMPT)) // PAGE)
    assert all(0 < gauges["hardkv_output_pages"] < gauges["hardkv_dense_output_pages"] <= most for gauges in condensed)
    check_log_lines(server.log_text()[log_start:])


def check_log_lines(log: str) -> None:
    """With one running request, the kept share follows from SGLang's own token count and the number of steps."""
    # not the line of a step that ended the request: nothing is held by then
    lines = re.findall(
        r"Decode batch, #running-req: 1, #token: ([1-9]\d*), token usage: [\d.]+, kv kept: ([\d.]+) %, ",
        log,
    )
    assert len(lines) >= NEW_TOKENS // LOG_INTERVAL - 2
    shares = [float(share) / 100 for _, share in lines]
    assert shares[0] == 1
    assert 0 < min(shares) < 0.8
    prefix = page_ceil(PROMPT)
    for index, ((used, _), share) in enumerate(zip(lines, shares, strict=True)):
        held = int(used) // PAGE - prefix // PAGE
        decoded = PROMPT + LOG_INTERVAL * index  # the step counter does not start with the request
        dense = {-(-max(0, decoded + ahead - prefix) // PAGE) for ahead in range(LOG_INTERVAL + 2)}
        # the allocator may be one page ahead of the last planned step
        agreeing = [pages for pages in dense - {0} for n in (held, held - 1) if abs(n / pages - share) < 6e-4]
        assert agreeing or (share == 1 and 0 in dense), (index, used, share)
