"""Scheduler: CPU time of admission, and of planning a decode step, beside running requests of Qwen3-8B shape.

    PYTHONPATH=.:tests python3 bench/scheduler/bench_admission.py [--json FILE]

Requests, states and pages are those of the host-only simulation of the tests, halfway through outputs of 4096 tokens
and in all phases of their intervals. "defined" is the forecast as the tests define it, which looks at every request at
every step; decisions are compared with it before anything is timed. Times are CPU time of the thread, medians.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from engine.simulated_serving import Request, Serving
from lifecycle.forecast_definition import need

from bench.machine import environment
from hardkv_sglang.config import HardKVConfig

ROOT = Path(__file__).parents[2]
PROMPT, OUTPUT, DECODED = 512, 4096, 2048
BURST = 128
RUNNING = (32, 64, 128, 256, 512)


def serving_of(num_running: int) -> Serving:
    """A server that has decoded for a while, with memory for everybody."""
    pages = (num_running + BURST) * (PROMPT + OUTPUT) // 32
    serving = Serving(HardKVConfig(), pages, [], lambda _, aged: aged // 3, max_running=num_running + BURST)
    requests = [Request(str(i), PROMPT, OUTPUT, OUTPUT, ignore_eos=True) for i in range(num_running)]
    waves = [requests[i :: DECODED // 64] for i in range(DECODED // 64)]
    for wave in waves:
        serving.force(wave)
        for _ in range(64):
            serving.decode()
    return serving


def burst_of(serving: Any, free: int) -> list[Any]:
    """Admit up to 128 new requests in one pass; returns those that fit."""
    admission = serving.admission.open(serving.running)
    admitted: list[Any] = []
    for i in range(BURST):
        req = Request(f"new {i}", PROMPT + i % 32, OUTPUT, OUTPUT, ignore_eos=True)
        if not admission.fits(free, admitted, req):
            break
        admitted.append(req)
    return admitted


def check(serving: Serving) -> None:
    """Decisions of a burst around the limit of the pool, against the definition."""
    free = len(serving.pool.free) * 32
    for share in (0.2, 0.5):
        room = int(free * share)
        admitted = burst_of(serving, room)
        for num in {max(1, len(admitted) - 2), len(admitted)}:
            req = Request("next", PROMPT + num % 32, OUTPUT, OUTPUT, ignore_eos=True)
            fits = need(serving.admission, serving.running, admitted[:num], req) <= room
            assert fits == (num < len(admitted) or len(admitted) == BURST), (share, num, len(admitted))


def cpu_ms(call: Callable[[], object], repeats: int) -> float:
    """Milliseconds of CPU time, median."""
    times = []
    for _ in range(repeats):
        start = time.thread_time()
        call()
        times.append(1e3 * (time.thread_time() - start))
    return round(median(times), 3)


def measure(num_running: int) -> dict[str, Any]:
    """One row of the table."""
    serving = serving_of(num_running)
    check(serving)
    admission: Any = serving.admission
    running, free = serving.running, 1 << 40
    req = Request("new", PROMPT, OUTPUT, OUTPUT, ignore_eos=True)
    views = [(serving.states[r], r.kv_committed_len) for r in running]
    seq_lens = [r.kv_committed_len for r in running]
    lacking = serving.relief.reserve(views, seq_lens) - 1
    return {
        "running": num_running,
        "one_ms": cpu_ms(lambda: admission.open(running).fits(free, [], req), 50),
        "one_defined_ms": cpu_ms(lambda: need(admission, running, [], req), 5),
        "burst_ms": cpu_ms(lambda: burst_of(serving, free), 9),
        "burst_defined_ms": cpu_ms(lambda: burst_defined(serving), 1),
        "plan_ms": cpu_ms(lambda: serving.planner.schedule.due(views), 50),
        "relief_ample_ms": cpu_ms(lambda: serving.relief.choose(views, seq_lens, 1 << 30), 50),
        "relief_short_ms": cpu_ms(lambda: serving.relief.choose(views, seq_lens, lacking), 50),
    }


def burst_defined(serving: Serving) -> None:
    """The same burst, every candidate from scratch."""
    requests = [Request(f"new {i}", PROMPT + i % 32, OUTPUT, OUTPUT, ignore_eos=True) for i in range(BURST)]
    for i, req in enumerate(requests):
        need(serving.admission, serving.running, requests[:i], req)


def main() -> None:
    """Print the table, and write it as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    arguments = parser.parse_args()
    print(f"{'running':>7} {'one candidate':>24} {f'burst of {BURST}':>24} {'due':>8} {'relief: ample, short':>22}")
    print(f"{'':>7} {'ms':>8} {'(defined)':>15} {'ms':>8} {'(defined)':>15} {'ms':>8} {'ms':>22}")
    rows = []
    for num_running in RUNNING:
        row = measure(num_running)
        rows.append(row)
        print(
            f"{num_running:7} {row['one_ms']:8.3f} {row['one_defined_ms']:15.2f} {row['burst_ms']:8.2f} "
            f"{row['burst_defined_ms']:15.1f} {row['plan_ms']:8.3f} "
            f"{row['relief_ample_ms']:14.4f} {row['relief_short_ms']:7.3f}",
            flush=True,
        )
    if arguments.json is not None:
        report = {**environment(ROOT, ("numpy", "sglang")), "rows": rows}
        arguments.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
