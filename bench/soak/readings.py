"""What a server says about itself: held tokens, counters, memory."""

from __future__ import annotations

import time
from typing import Any

import psutil
from prometheus_client.parser import text_string_to_metric_families

from bench.soak.client import Client, SoakError
from hardkv_sglang.observability.metrics import COUNTERS, GAUGES

IDLE_TIMEOUT_S = 120.0
PUBLISH_TIMEOUT_S = 60.0
"""SGLang publishes its series when it gets idle, which comes after the last answer."""
HELD = ("num_running_reqs", "num_waiting_reqs", "num_used_tokens")


def wait_idle(client: Client) -> dict[str, int]:
    """What is still held once the server is idle, or after `IDLE_TIMEOUT_S`; nothing is as it should be."""
    deadline = time.monotonic() + IDLE_TIMEOUT_S
    while True:
        loads = client.get("/v1/loads").json()["loads"]
        held = {name: sum(load[name] for load in loads) for name in HELD}
        if not any(held.values()) or time.monotonic() > deadline:
            return {name: value for name, value in held.items() if value}
        time.sleep(0.2)


def compression(client: Client) -> dict[str, float] | None:
    """Counters of compression, summed over replicas; None for a stock server."""
    states = client.get("/server_info").json()["internal_states"]
    blocks = [state["hardkv"] for state in states if "hardkv" in state]
    return {s.source: sum(block[s.source] for block in blocks) for s in COUNTERS} if blocks else None


def series(client: Client) -> dict[str, float]:
    """Our series on /metrics by the name of what they show, summed over replicas. Raises `SoakError` without any."""
    sums: dict[str, float] = {}
    for family in text_string_to_metric_families(client.get("/metrics").text):
        for sample in family.samples:
            sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
    missing = [s.name for s in (*COUNTERS, *GAUGES) if s.name not in sums]
    if missing:
        raise SoakError(f"no series {', '.join(missing)}: the server needs --enable-metrics")
    return {s.source: sums[s.name] for s in (*COUNTERS, *GAUGES)}


def published(client: Client, counters: dict[str, float]) -> dict[str, float]:
    """Our series once they agree with `counters`, or as they are after `PUBLISH_TIMEOUT_S`."""
    deadline = time.monotonic() + PUBLISH_TIMEOUT_S
    while True:
        values = series(client)
        if not differences(counters, values) or time.monotonic() > deadline:
            return values
        time.sleep(1.0)


def differences(counters: dict[str, float], values: dict[str, float]) -> list[str]:
    """Where series and counters disagree, up to the rounding of a sum of floats."""
    return [
        f"{name} {value} in /server_info, {values[name]} in /metrics"
        for name, value in counters.items()
        if abs(value - values[name]) > 1e-6 * max(1.0, abs(value))
    ]


def resident_bytes(pid: int) -> int:
    """Resident memory of a process and all that it started."""
    parent = psutil.Process(pid)
    total = 0
    for process in (parent, *parent.children(recursive=True)):
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def fixed_answer(client: Client, num_tokens: int) -> Any:
    """Tokens of a greedy request that runs alone on an empty cache."""
    client.post("/flush_cache", params={"timeout": 60})
    ids = [500 + 37 * i % 15000 for i in range(75)]
    sampling = {"temperature": 0, "max_new_tokens": num_tokens, "ignore_eos": True}
    return client.ask("/generate", {"input_ids": ids, "sampling_params": sampling})["output_ids"]
