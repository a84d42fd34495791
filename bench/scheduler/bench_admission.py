"""Scheduler: CPU time of admission, and of planning a decode step, beside running requests of Qwen3-8B shape.

    PYTHONPATH=.:tests python3 bench/scheduler/bench_admission.py [--json FILE]

Requests and their states are those of the host-only simulation of the tests, halfway through outputs of 4096 tokens
and in all phases of their intervals; pages are not counted, so that no figure holds the simulation's own work.
"defined" is the forecast as the tests define it, which looks at every request at every step; decisions are compared
with it before anything is timed. Times are CPU time of the thread, medians; those of planning over 256 decode steps.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from bisect import bisect_left
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
STEPS = 256


class AmplePages:
    """Pages for everybody, which nobody counts."""

    def __init__(self, num_pages: int) -> None:
        self.free = range(num_pages)
        self.log: list[str] = []

    def alloc_pages(self, num_pages: int) -> range:
        """As many as asked for."""
        return self.free[:num_pages]

    def free_pages(self, slots: object) -> None:
        """Nothing to do."""

    def free_row(self, row: int, start: int, end: int) -> None:
        """Nothing to do."""

    def extend_row(self, row: int, seq_len: int) -> bool:
        """There is always room."""
        return True


def serving_of(num_running: int) -> Serving:
    """A server that has decoded for a while, with memory for everybody."""
    pages = (num_running + BURST) * (PROMPT + OUTPUT) // 32
    serving = Serving(HardKVConfig(), pages, [], lambda _, aged: aged // 3, max_running=num_running + BURST)
    serving.pool = AmplePages(pages)  # type: ignore[assignment]
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


def plan_ms(serving: Serving) -> list[float]:
    """Milliseconds of CPU time that the planner takes in each of some decode steps, rising; settling included."""
    planner: Any = serving.planner
    spent = 0.0

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            nonlocal spent
            start = time.thread_time()
            result = call(*args)
            spent += 1e3 * (time.thread_time() - start)
            return result

        return run

    planner.plan, planner.settle = timed(planner.plan), timed(planner.settle)
    times = []
    for _ in range(STEPS):
        spent = 0.0
        serving.decode()
        times.append(spent)
    del planner.plan, planner.settle
    return sorted(times)


def measure(num_running: int) -> dict[str, Any]:
    """One row of the table."""
    serving = serving_of(num_running)
    check(serving)
    admission: Any = serving.admission
    running, free = serving.running, 1 << 40
    req = Request("new", PROMPT, OUTPUT, OUTPUT, ignore_eos=True)
    views = [(serving.states[r], r.kv_committed_len) for r in running]
    seq_lens = [r.kv_committed_len for r in running]

    def relief(available_pages: int) -> Any:
        return serving.relief.choose(views, seq_lens, available_pages)

    reserve = bisect_left(range(1 << 20), True, key=lambda pages: not relief(pages).hurry)
    row = {
        "running": num_running,
        "one_ms": cpu_ms(lambda: admission.open(running).fits(free, [], req), 200),
        "one_defined_ms": cpu_ms(lambda: need(admission, running, [], req), 5),
        "burst_ms": cpu_ms(lambda: burst_of(serving, free), 25),
        "burst_defined_ms": cpu_ms(lambda: burst_defined(serving), 1),
        "relief_ample_ms": cpu_ms(lambda: relief(1 << 30), 50),
        "relief_short_ms": cpu_ms(lambda: relief(reserve - 1), 50),
        "relief_empty_ms": cpu_ms(lambda: relief(0), 50),
    }
    times = plan_ms(serving)
    return row | {"plan_ms": round(median(times), 3), "plan_p99_ms": round(times[int(0.99 * STEPS)], 3)}


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
    print(f"{'running':>7} {'one candidate':>16} {f'burst of {BURST}':>17} {'planning':>15} {'relief':>22}")
    print(f"{'':>7} {'(defined)':>16} {'(defined)':>17} {'p50, p99':>15} {'ample, short, empty':>22}  all in ms")
    rows = []
    for num_running in RUNNING:
        row = measure(num_running)
        rows.append(row)
        print(
            f"{num_running:7} {row['one_ms']:8.3f} {row['one_defined_ms']:7.2f} {row['burst_ms']:8.2f} "
            f"{row['burst_defined_ms']:8.1f} {row['plan_ms']:7.3f} {row['plan_p99_ms']:7.3f} "
            f"{row['relief_ample_ms']:8.4f} {row['relief_short_ms']:6.3f} {row['relief_empty_ms']:6.3f}",
            flush=True,
        )
    if arguments.json is not None:
        report = {**environment(ROOT, ("numpy", "numba", "sglang")), "load": os.getloadavg()[0], "rows": rows}
        arguments.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
