"""Where the time of decode steps goes: SGLang's own profiler around some steps of a running server, summed up.

A trace also proves what a step does not do: wait for the device, or allocate device memory.
"""

from __future__ import annotations

import gzip
import itertools
import json
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hardkv_sglang.cli.server_process import ServerProcess

WAIT_S = 120.0
GPU_CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")
HOST_CATEGORIES = ("cuda_runtime", "cuda_driver")
WAITS = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaMemcpy", "cuStreamSynchronize", "cuCtxSynchronize")
"""Host calls that wait for the device. SGLang itself waits on events, `cudaEventSynchronize`, for a step's results."""
ALLOCATIONS = ("cudaMalloc", "cudaMallocAsync", "cudaHostAlloc", "cudaFree", "cudaFreeHost", "cuMemAlloc_v2")
DECODE_STEP = "cudaGraphLaunch"
OWN_GROUPS: Mapping[str, tuple[str, ...]] = {
    "ragged_decode": ("ragged_decode_kernel",),
    "ragged_plan": ("plan_kernel",),
    "shared_prefix": ("shared_prefix_kernel",),
    "finish": ("finish_kernel",),
    "events": (
        "list_candidates_kernel", "weigh_kernel", "importance_kernel", "value_", "bound_kernel", "publish_kernel",
        "count_kernel", "copy_kernel",
    ),
}  # fmt: skip
"""Our kernels by the start of their name. What events do in torch is `other`."""
GROUPS: Mapping[str, tuple[str, ...]] = {
    "dense attention": ("BatchDecode", "BatchPrefill", "PersistentVariable", "VariableLengthMerge"),
    "matrix products": ("gemm", "nvjet", "cutlass", "cublas", "splitK", "gemv"),
}
"""Others by a part of it."""


@dataclass(frozen=True)
class StepTrace:
    """Sums over the profiled steps of one process."""

    steps: int  # decode steps launched as graphs
    span_us: float  # first to last GPU activity
    busy_us: float  # at least one kernel runs
    groups_us: dict[str, float]  # GPU time by group
    kernels_us: dict[str, float]  # the longest, by name
    host_calls: dict[str, int]  # CUDA API calls by name
    step_times_us: list[float]  # from one graph's first kernel to the next one's, in order

    @classmethod
    def read(cls, path: Path) -> StepTrace:
        """Sum up a Chrome trace of torch's profiler."""
        with gzip.open(path, "rt") as file:
            events: list[dict[str, Any]] = json.load(file)["traceEvents"]
        on_gpu = [e for e in events if e.get("cat") in GPU_CATEGORIES]
        calls = Counter(e["name"] for e in events if e.get("cat") in HOST_CATEGORIES)
        kernels: dict[str, float] = defaultdict(float)
        groups: dict[str, float] = defaultdict(float)
        for event in on_gpu:
            kernels[event["name"]] += event["dur"]
            groups[group_of(event["name"])] += event["dur"]
        intervals = sorted((float(e["ts"]), float(e["ts"]) + float(e["dur"])) for e in on_gpu)
        longest = dict(sorted(kernels.items(), key=lambda item: -item[1])[:24])
        span = max((end for _, end in intervals), default=0.0) - (intervals[0][0] if intervals else 0.0)
        starts = graph_starts(events, on_gpu)
        times = [after - before for before, after in itertools.pairwise(starts)]
        return cls(calls[DECODE_STEP], span, covered(intervals), dict(groups), longest, dict(calls), times)

    def waits(self) -> int:
        """Host calls that wait for everything the device has to do."""
        return sum(self.host_calls.get(name, 0) for name in WAITS)

    def allocations(self) -> int:
        """Host calls that allocate or free memory."""
        return sum(self.host_calls.get(name, 0) for name in ALLOCATIONS)

    def per_step(self) -> dict[str, Any]:
        """Microseconds of one step, for JSON."""
        steps = max(1, self.steps)
        return {
            "steps": self.steps,
            "step_us": round(self.span_us / steps, 1),
            "busy_us": round(self.busy_us / steps, 1),
            "median_step_us": round(statistics.median(self.step_times_us or [0.0]), 1),
            "slowest_step_us": round(max(self.step_times_us, default=0.0), 1),
            "groups_us": {name: round(us / steps, 1) for name, us in sorted(self.groups_us.items())},
            "kernels_us": {name[:110]: round(us / steps, 1) for name, us in self.kernels_us.items()},
            "host_waits": self.waits(),
            "host_allocations": self.allocations(),
            "host_calls": self.host_calls,
        }


def graph_starts(events: Sequence[Mapping[str, Any]], on_gpu: Sequence[Mapping[str, Any]]) -> list[float]:
    """When the first kernel of each decode step started, in order."""
    launches = {correlation(e) for e in events if e.get("name") == DECODE_STEP}
    starts: dict[Any, float] = {}
    for event in on_gpu:
        launch = correlation(event)
        if launch in launches:
            starts[launch] = min(starts.get(launch, float("inf")), float(event["ts"]))
    return sorted(starts.values())


def correlation(event: Mapping[str, Any]) -> Any:
    """What a launch and its kernels have in common."""
    return event.get("args", {}).get("correlation", -1)


def group_of(kernel: str) -> str:
    """Group of a kernel's name."""
    for group, starts in OWN_GROUPS.items():
        if kernel.startswith(starts):
            return group
    for group, parts in GROUPS.items():
        if any(part in kernel for part in parts):
            return group
    return "other"


def covered(intervals: Sequence[tuple[float, float]]) -> float:
    """Length of the union of sorted intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in intervals:
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def profile_steps(server: ServerProcess, num_steps: int, folder: Path) -> StepTrace:
    """Profile the next steps of a server that is decoding. Raises `TimeoutError` if no trace appears."""
    folder.mkdir(parents=True, exist_ok=True)
    before = set(folder.glob("*.trace.json.gz"))
    server.start_profile(str(folder), num_steps)
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        new = sorted(set(folder.glob("*.trace.json.gz")) - before)
        if new and is_whole(new[0]):
            return StepTrace.read(new[0])
        time.sleep(0.5)
    raise TimeoutError(f"no trace of {num_steps} steps in {folder} after {WAIT_S:.0f} s")


def is_whole(path: Path) -> bool:
    """Whether a gzip file has been written to its end."""
    try:
        with gzip.open(path, "rb") as file:
            while file.read(1 << 20):
                pass
    except EOFError:
        return False
    return True
