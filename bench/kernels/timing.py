"""Timing by CUDA graph replay, and the copy bandwidth everything is compared with."""

from __future__ import annotations

from collections.abc import Callable

import torch


def replay_times(launch: Callable[[], None], calls: int, repeats: int = 60) -> list[float]:
    """Sorted microseconds per call of a captured graph that makes `calls` calls."""
    launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    return [t / calls for t in event_times(graph.replay, repeats)]


def event_times(launch: Callable[[], object], repeats: int) -> list[float]:
    """Sorted microseconds of `launch`, by CUDA events, after a warm-up."""
    for _ in range(5):
        launch()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        start.record()
        launch()
        end.record()
    torch.cuda.synchronize()
    return sorted(1e3 * start.elapsed_time(end) for start, end in events)


def percentiles(times: list[float]) -> dict[str, float]:
    """p20, p50 and p80 in microseconds."""
    return {f"p{p}_us": round(times[len(times) * p // 100], 2) for p in (20, 50, 80)}


def copy_bandwidth(gigabytes: float = 4.0) -> float:
    """Bytes per second, read plus written, of a large device-to-device copy."""
    source = torch.randn(int(gigabytes * 2**30) // 4, device="cuda")
    target = torch.empty_like(source)
    # not from a graph: a captured copy may go to a copy engine, which is slower
    times = event_times(lambda: target.copy_(source), repeats=20)
    return 2 * source.numel() * 4 / (times[len(times) // 2] * 1e-6)
