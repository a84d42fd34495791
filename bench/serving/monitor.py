"""What a server says about itself while it is measured: its decode log and the counters of compression."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from datetime import datetime
from statistics import mean
from typing import Any

from hardkv_sglang.cli.server_process import ServerProcess

DECODE_LINE = re.compile(
    r"^\[(?P<time>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)[^\]]*\] Decode batch.*?#running-req: (?P<running>\d+), "
    r"#token: (?P<tokens>\d+), .*?gen throughput \(token/s\): (?P<rate>[\d.]+), #queue-req: (?P<queued>\d+)",
    re.MULTILINE,
)
RETRACTION = re.compile(r"KV cache pool is full\. Retract requests\. #retracted_reqs: (\d+)")
COUNTERS = ("select_events", "condense_events", "postponed_events", "candidate_tokens", "kept_tokens")


@dataclass(frozen=True)
class Sample:
    """One decode line: the state of the server every `--decode-log-interval` steps."""

    seconds: float  # since the epoch
    running: int  # requests
    queued: int  # requests
    tokens: int  # of the pool, held by running requests
    rate: float  # tokens per second since the line before


def parse_samples(log: str) -> list[Sample]:
    """The decode lines of a log. The log knows whole seconds: lines of one second are spread over it."""
    matches = list(DECODE_LINE.finditer(log))
    lines_in = Counter(match["time"] for match in matches)
    seen: Counter[str] = Counter()
    samples = []
    for match in matches:
        time = match["time"]
        seconds = datetime.fromisoformat(time).timestamp() + seen[time] / lines_in[time]
        seen[time] += 1
        samples.append(
            Sample(seconds, int(match["running"]), int(match["queued"]), int(match["tokens"]), float(match["rate"]))
        )
    return samples


def count_retractions(log: str) -> int:
    """Requests that were thrown out of a full pool, counted each time."""
    return sum(int(number) for number in RETRACTION.findall(log))


def summarise_log(log: str) -> dict[str, float | None]:
    """Running requests (mean over decode steps, and most), peak of held pool tokens, retractions."""
    samples = parse_samples(log)
    return {
        "running_mean": mean(sample.running for sample in samples) if samples else None,
        "running_max": max((sample.running for sample in samples), default=None),
        "peak_tokens": max((sample.tokens for sample in samples), default=None),
        "retractions": count_retractions(log),
    }


def read_counters(server: ServerProcess) -> dict[str, Any] | None:
    """Counters of compression since the server started; None for a stock server."""
    block: dict[str, Any] | None = server.server_info()["internal_states"][0].get("hardkv")
    return block


def summarise_counters(before: dict[str, Any] | None, after: dict[str, Any] | None) -> dict[str, float | None]:
    """Events between two readings, and the share of the scored tokens that they kept."""
    names = ("select_events", "condense_events", "postponed_events", "kept_fraction")
    if before is None or after is None:
        return dict.fromkeys(names)
    grown = {name: after[name] - before[name] for name in COUNTERS}
    candidates = grown["candidate_tokens"]
    kept = grown["kept_tokens"] / candidates if candidates else None
    return {**{name: grown[name] for name in names[:-1]}, "kept_fraction": kept}
