"""Select events: time of scoring, choosing and publishing for one request of Qwen3-8B shape.

    PYTHONPATH=. python3 bench/kernels/bench_select.py [--json FILE]

All 288 lists at once, launches eager, as in the runtime. Scores of the kernels are first compared with those of the
torch definition, which is timed as well. Beside the device time stands what the host needs to queue the event.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from inputs import Inputs, Shape, build
from report import write_report
from timing import copy_bandwidth, event_times, percentiles

from hardkv_sglang.events.executor import EventExecutor
from hardkv_sglang.events.scoring import TorchScorer
from hardkv_sglang.lifecycle.request_state import RequestState
from hardkv_sglang.lifecycle.step_plan import SelectOp
from hardkv_sglang.memory_pool.rank_memory import RankMemory
from hardkv_sglang.selection.policies import make_policy

SPAN, RECENT = 512, 128
SHAPES = [
    Shape("512 condensed + 512 dense", batch=1, uniform=512, layers=36, sparse_share=1e-9),
    Shape("2048 condensed + 512 dense", batch=1, uniform=2048, layers=36, sparse_share=1e-9),
    Shape("ragged (mean 560) + 512 dense", batch=1, layers=36, sparse_share=1e-9),
]


def make_event(inputs: Inputs) -> tuple[EventExecutor, SelectOp]:
    """An executor, and a select event of the only request."""
    tables, cfg = inputs.tables, inputs.cfg
    tables.query_ring.normal_()
    tables.lse2_ring.fill_(12.0)  # more than any sum of these logits, as if the window had most of the attention
    bound = int(tables.num_condensed[:, 1].max())
    seq_len = SPAN + RECENT
    op = SelectOp(
        state=RequestState(1, 0, 0, 0, seq_len), row=1,
        prefix_end=0, condensed_end=0, old_recent_start=0, recent_start=SPAN,
        first_query=seq_len - cfg.options.query_window, seq_len=seq_len, condensed_list_bound=bound,
        recalibrate=False, ring_slot=0,
    )  # fmt: skip
    memory = RankMemory(cfg, tables, inputs.k, inputs.v, inputs.req_to_token)
    return EventExecutor(memory, tp_group=None), op


def check(executor: EventExecutor, op: SelectOp) -> None:
    """Scores of the kernels and what they choose, against the torch definition."""
    ours, torchs = executor.scorer.score(op), TorchScorer(executor.reader).score(op)
    error = float((ours.scores - torchs.scores).norm() / torchs.scores.norm())
    assert error < 1e-3, f"relative error of the scores {error}"
    assert torch.equal(ours.valid, torchs.valid)
    defined = make_policy(executor.memory.cfg.options, executor.memory.layout.page_size)
    assert torch.equal(executor.policy.choose(ours).keep, defined.choose(ours).keep)


def host_us(launch: Callable[[], object], repeats: int = 20) -> float:
    """Microseconds in which the host queues the work, median."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        launch()
        times.append(1e6 * (time.perf_counter() - start))
    return round(sorted(times)[repeats // 2], 1)


def measure(shape: Shape) -> dict[str, Any]:
    """One row of the table. The gate runs first."""
    inputs = build(shape)
    executor, op = make_event(inputs)
    check(executor, op)
    scored = executor.scorer.score(op)
    selection = executor.policy.choose(scored)
    phases: dict[str, Callable[[], object]] = {
        "score": lambda: executor.scorer.score(op),
        "score_torch": lambda: TorchScorer(executor.reader).score(op),
        "choose": lambda: executor.policy.choose(scored),
        "publish": lambda: executor.operations.publish(
            executor.memory.tables, op, selection.keep, selection.temperature
        ),
        "event": lambda: executor._select(op),
    }
    row: dict[str, Any] = {"shape": shape.name, "kept_mean": round(float(selection.keep.sum(1).float().mean()), 1)}
    for name, launch in phases.items():
        row[f"{name}_us"] = percentiles(event_times(launch, repeats=20))["p50_us"]
    row["host_us"] = host_us(phases["event"])
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the rows there")
    parser.add_argument("--layers", type=int, default=36)
    args = parser.parse_args()
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    rows = []
    for shape in SHAPES:
        rows.append(measure(replace(shape, layers=args.layers)))
        print("  ".join(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
        torch.cuda.empty_cache()
    if args.json:
        write_report(args.json, rows, copy_bandwidth())


if __name__ == "__main__":
    main()
