"""Condense events: correctness gate, then time and share of the copy bandwidth.

    PYTHONPATH=. python3 bench/kernels/bench_condense.py [--json FILE]

All lists move back and forth between two sets of pages with every token kept, which is the largest copy that an
event can make (sparse tokens move in the first event only, so they are part of the gate, not of the times).
Launches are eager, as in the runtime.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from inputs import Inputs, Shape, build
from report import write_report
from timing import copy_bandwidth, event_times, percentiles

from hardkv_sglang.kernels import reference_condense
from hardkv_sglang.kernels.condense import condense

SHAPES = [
    Shape("1 request x 288 lists x 2048", batch=1, uniform=2048, layers=36),
    Shape("4 requests x 288 lists x 2048", batch=4, uniform=2048, layers=36),
    Shape("4 requests x 288 ragged lists", batch=4, layers=36),
    Shape("4 requests x 288 ragged, 20 % sparse", batch=4, layers=36, sparse_share=0.2),
]


def run(inputs: Inputs, pages: torch.Tensor) -> None:
    tables = inputs.tables
    condense(inputs.k, inputs.v, inputs.cfg.layout, tables, inputs.req_to_token, inputs.rows, pages)


def check(inputs: Inputs, pages: torch.Tensor) -> None:
    """The first event, with two fifths of the condensed tokens kept, against the reference on a copy."""
    tables, layout = inputs.tables, inputs.cfg.layout
    tables.condensed_keep.copy_(torch.rand(tables.condensed_keep.shape, device="cuda") < 0.4)
    copy = type(tables)(**{name: getattr(tables, name).clone() for name in vars(tables)})
    k, v = inputs.k.clone(), inputs.v.clone()
    kept = (k, v, inputs.k.clone(), inputs.v.clone(), {n: getattr(tables, n).clone() for n in vars(tables)})
    run(inputs, pages)
    for row, new_pages in zip(inputs.rows.tolist(), pages, strict=True):
        reference_condense.condense(k, v, layout, copy, inputs.req_to_token, row, new_pages)
    assert torch.equal(k, inputs.k) and torch.equal(v, inputs.v), "pools differ from the reference"
    for name in ("num_condensed", "first_page", "num_sparse", "condensed_pages"):
        assert torch.equal(getattr(copy, name), getattr(tables, name)), name
    inputs.k.copy_(kept[2])
    inputs.v.copy_(kept[3])
    for name, table in kept[4].items():
        getattr(tables, name).copy_(table)
    tables.condensed_keep.fill_(True)


def measure(shape: Shape, bandwidth: float) -> dict[str, Any]:
    """One row of the table. The gate runs first."""
    pages_per_row = 96
    inputs = build(shape, spare_pages=2 * shape.batch * pages_per_row)
    sets = inputs.free_pages[: 2 * shape.batch * pages_per_row].view(2, shape.batch, pages_per_row).contiguous()
    check(inputs, sets[0])
    moved = 2 * inputs.layer_bytes * shape.layers
    state = [0]

    def event() -> None:
        state[0] ^= 1
        run(inputs, sets[state[0]])

    times = event_times(event, repeats=30)
    p50 = percentiles(times)["p50_us"]
    return {
        "shape": shape.name, "mbytes": round(moved / 1e6, 1), **percentiles(times),
        "tb_per_s": round(moved / p50 / 1e6, 2), "copy_share": round(moved / p50 * 1e6 / bandwidth, 3),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the rows there")
    args = parser.parse_args()
    torch.manual_seed(0)
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {bandwidth / 1e12:.2f} TB/s")
    rows = []
    for shape in SHAPES:
        rows.append(measure(shape, bandwidth))
        print("  ".join(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
        torch.cuda.empty_cache()
    if args.json:
        write_report(args.json, rows, bandwidth)


if __name__ == "__main__":
    main()
