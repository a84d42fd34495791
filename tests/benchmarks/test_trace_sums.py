"""What `bench.serving.step_trace` makes of a profiler's trace."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from bench.serving.step_trace import StepTrace, covered, group_of, is_whole

EVENTS = [
    {"cat": "cuda_runtime", "name": "cudaGraphLaunch", "ts": 0, "dur": 5},
    {"cat": "cuda_runtime", "name": "cudaStreamSynchronize", "ts": 6, "dur": 1},
    {"cat": "cuda_driver", "name": "cuMemAlloc_v2", "ts": 7, "dur": 1},
    {"cat": "cpu_op", "name": "aten::sort", "ts": 7, "dur": 100},
    {"cat": "kernel", "name": "ragged_decode_kernel", "ts": 10, "dur": 20},
    {"cat": "kernel", "name": "nvjet_sm90_tst", "ts": 20, "dur": 30},
    {"cat": "gpu_memcpy", "name": "Memcpy DtoD", "ts": 60, "dur": 4},
    {"name": "process_name", "ph": "M"},
]


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "x.trace.json.gz"
    with gzip.open(path, "wt") as file:
        json.dump({"traceEvents": EVENTS}, file)
    return path


def test_sums_of_a_trace(trace: Path) -> None:
    sums = StepTrace.read(trace)
    assert (sums.steps, sums.span_us, sums.busy_us) == (1, 54, 44)
    assert sums.groups_us == {"ragged_decode": 20, "matrix products": 30, "other": 4}
    assert (sums.waits(), sums.allocations()) == (1, 1)
    assert sums.per_step()["step_us"] == 54


def test_time_of_each_step(tmp_path: Path) -> None:
    launches = [
        {"cat": "cuda_runtime", "name": "cudaGraphLaunch", "ts": i, "dur": 1, "args": {"correlation": i}}
        for i in range(4)
    ]
    # two kernels a graph, and one outside of any
    kernels = [
        {"cat": "kernel", "name": "x", "ts": 10 * i * i + late, "dur": 1, "args": {"correlation": i}}
        for i in range(4)
        for late in (3, 0)
    ]
    other = {"cat": "kernel", "name": "copy_kernel", "ts": 5, "dur": 1, "args": {"correlation": 77}}
    path = tmp_path / "x.trace.json.gz"
    with gzip.open(path, "wt") as file:
        json.dump({"traceEvents": [*launches, *kernels, other]}, file)
    trace = StepTrace.read(path)
    assert trace.step_times_us == [10, 30, 50]
    assert (trace.per_step()["median_step_us"], trace.per_step()["slowest_step_us"]) == (30, 50)


def test_a_trace_without_gpu_activity(tmp_path: Path) -> None:
    path = tmp_path / "empty.trace.json.gz"
    with gzip.open(path, "wt") as file:
        json.dump({"traceEvents": []}, file)
    assert StepTrace.read(path).per_step()["steps"] == 0


def test_a_trace_that_is_still_written(trace: Path) -> None:
    assert is_whole(trace)
    trace.write_bytes(trace.read_bytes()[:-9])
    assert not is_whole(trace)


def test_groups_of_kernels() -> None:
    assert group_of("copy_kernel") == "events"
    assert group_of("void at::native::direct_copy_kernel_cuda") == "other"
    assert group_of("void flashinfer::BatchPrefillWithPagedKVCacheKernel<...>") == "dense attention"


def test_covered_is_the_union() -> None:
    assert covered([]) == 0
    assert covered([(0, 10), (2, 5), (8, 12), (20, 21)]) == 13
