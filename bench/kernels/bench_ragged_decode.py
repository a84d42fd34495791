"""Ragged decode attention: correctness gate, then time against FlashInfer dense decode of the same bytes.

    PYTHONPATH=. python3 bench/kernels/bench_ragged_decode.py [--bits 4] [--sweep] [--json FILE]

A graph of one call per layer over layers with their own data is replayed; times are per layer.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from inputs import Inputs, Shape, build
from report import write_report
from timing import copy_bandwidth, percentiles, replay_times

from hardkv_sglang.kernels import reference
from hardkv_sglang.kernels.packed_decode import packed_decode
from hardkv_sglang.kernels.ragged_decode import ragged_decode
from hardkv_sglang.kernels.ragged_plan import plan_ragged_decode
from hardkv_sglang.kernels.ragged_workspace import RaggedWorkspace, SplitTokens, Tuning

SHAPES = [
    Shape("512 lists x 2048", batch=64, uniform=2048),
    Shape("512 ragged lists", batch=64),
    Shape("512 ragged, 20 % sparse", batch=64, sparse_share=0.2),
    Shape("256 lists x 2048", batch=32, uniform=2048),
    Shape("256 ragged lists", batch=32),
    Shape("128 ragged lists", batch=16),
    Shape("64 ragged lists", batch=8),
    Shape("8 ragged lists", batch=1),
    Shape("256 ragged, d=64, G=3", batch=86, num_kv_heads=3, num_q_heads=9, head_dim=64),
]


class Op:
    """The op bound to one set of inputs."""

    def __init__(self, inputs: Inputs, tuning: Tuning | None = None, split: SplitTokens | None = None) -> None:
        self.inputs, self.tuning = inputs, tuning
        layout = inputs.cfg.layout
        most = inputs.cfg.max_condensed_tokens + inputs.cfg.max_sparse_span
        split = split or SplitTokens.by_load()
        heads, batch = inputs.shape.num_q_heads, inputs.shape.batch
        self.workspace = RaggedWorkspace.allocate(layout, heads, batch, most, "cuda", split)
        self.state = torch.randn_like(inputs.q[0]), torch.randn(inputs.q.shape[1:3], device="cuda")

    def plan(self) -> None:
        plan_ragged_decode(self.workspace, self.inputs.cfg.layout, self.inputs.tables, self.inputs.rows)

    def layer(self, layer: int) -> None:
        x = self.inputs
        decode = packed_decode if x.cfg.layout.survivors.is_packed else ragged_decode
        decode(
            self.workspace, x.cfg.layout, x.tables, x.req_to_token, x.k, x.v, layer, x.q[layer],
            x.cfg.softmax_scale, self.state, self.tuning,
        )  # fmt: skip

    def all_layers(self) -> None:
        for layer in range(self.inputs.shape.layers):
            self.layer(layer)

    def check(self) -> None:
        """Against the float64 reference, on a few requests of the last layer."""
        x, layer = self.inputs, self.inputs.shape.layers - 1
        self.plan()
        before = [tensor.normal_().clone() for tensor in self.state]
        self.layer(layer)
        for b in range(0, x.shape.batch, max(1, x.shape.batch // 5)):
            row = int(x.rows[b])
            args = (x.k, x.v, x.cfg.layout, x.tables, x.req_to_token, layer, row, x.cfg.softmax_scale)
            lists = reference.ragged_decode(x.q[layer, b].double(), *args)
            o, lse2 = reference.merge_states(lists, (before[0][b].double(), before[1][b].double()))
            error = float((self.state[0][b].double() - o).norm() / o.norm())
            assert error < 6e-3, f"{x.shape.name}: relative error {error}"
            torch.testing.assert_close(self.state[1][b].double(), lse2, rtol=0, atol=1e-3)


def flashinfer_dense(inputs: Inputs, merge: bool) -> list[float] | None:
    """Times per layer of FlashInfer's paged decode over contiguous requests that read the same bytes."""
    try:
        import flashinfer
    except ImportError:
        return None
    s, layout = inputs.shape, inputs.cfg.layout
    tokens = round(inputs.list_tokens)
    pages = -(-tokens // s.page_size)
    indices = torch.randperm(layout.num_slots // s.page_size)[: s.batch * pages].int().cuda()
    indptr = torch.arange(s.batch + 1, dtype=torch.int32) * pages
    last = torch.full((s.batch,), tokens - (pages - 1) * s.page_size, dtype=torch.int32)
    scratch = torch.zeros(256 << 20, dtype=torch.uint8, device="cuda")
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(scratch, "NHD", use_tensor_cores=True)
    kinds = {"q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16}
    wrapper.plan(indptr, indices, last, s.num_q_heads, s.num_kv_heads, s.head_dim, s.page_size, **kinds)
    pool = [x.view(s.layers, -1, s.page_size, s.num_kv_heads, s.head_dim) for x in (inputs.k, inputs.v)]
    o, lse2 = torch.empty_like(inputs.q[0]), torch.empty(inputs.q.shape[1:3], device="cuda")
    other = torch.randn_like(o), torch.randn_like(lse2)

    def launch() -> None:
        for layer in range(s.layers):
            wrapper.run(inputs.q[layer], (pool[0][layer], pool[1][layer]), out=o, lse=lse2, return_lse=True)
            if merge:
                flashinfer.merge_state_in_place(o, lse2, *other)

    return replay_times(launch, s.layers)


def measure(shape: Shape, bandwidth: float, with_flashinfer: bool) -> dict[str, Any]:
    """One row of the table. The gate runs first."""
    inputs = build(shape, spare_pages=shape.batch * 8)
    op = Op(inputs)
    op.check()
    fused = replay_times(op.all_layers, shape.layers)
    row: dict[str, Any] = {"shape": shape.name, "mean_tokens": round(inputs.list_tokens, 1)}
    row |= {"mbytes": round(inputs.layer_bytes / 1e6, 1), **percentiles(fused)}
    p50 = row["p50_us"]
    row["tb_per_s"] = round(inputs.layer_bytes / p50 / 1e6, 2)
    row["copy_share"] = round(inputs.layer_bytes / p50 * 1e6 / bandwidth, 3)
    row["plan_p50_us"] = percentiles(replay_times(op.plan, 1))["p50_us"]
    if with_flashinfer:
        for name, merge in (("flashinfer_p50_us", False), ("flashinfer_merge_p50_us", True)):
            times = flashinfer_dense(inputs, merge)
            row[name] = percentiles(times)["p50_us"] if times else None
    return row


def sweep(shape: Shape) -> list[dict[str, Any]]:
    """p50 of every tuning and split length, fastest first. The gate runs for each."""
    inputs = build(shape, spare_pages=shape.batch * 8)
    results: list[dict[str, Any]] = []
    for block, warps, stages in [(32, 2, 3), (32, 2, 4), (32, 4, 3), (64, 4, 3), (64, 4, 2), (64, 2, 2)]:
        for split in (256, 512, 1024):
            for programs in (2, 4, 6, 20):
                op = Op(inputs, Tuning(block, warps, stages, programs), SplitTokens(split, split, split))
                op.check()
                p50 = percentiles(replay_times(op.all_layers, shape.layers, repeats=15))["p50_us"]
                results.append({"p50_us": p50, "split": split, "tuning": op.tuning})
    return sorted(results, key=lambda r: r["p50_us"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sweep", action="store_true", help="print the fastest tunings of each shape instead")
    parser.add_argument("--shapes", type=int, nargs="*", help="indices into SHAPES", default=range(len(SHAPES)))
    parser.add_argument("--bits", type=int, default=16, choices=(16, 8, 4), help="of condensed tokens")
    parser.add_argument("--json", type=Path, help="also write the rows there")
    args = parser.parse_args()
    torch.manual_seed(0)
    shapes = [replace(SHAPES[i], survivor_bits=args.bits) for i in args.shapes]
    if args.sweep:
        for shape in shapes:
            print(shape.name)
            for result in sweep(replace(shape, layers=4))[:14]:
                print("  ", result["p50_us"], result["split"], result["tuning"], flush=True)
        return
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {bandwidth / 1e12:.2f} TB/s")
    rows = []
    for shape in shapes:
        rows.append(measure(shape, bandwidth, with_flashinfer=shape.head_dim == 128))
        print("  ".join(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
        torch.cuda.empty_cache()
    if args.json:
        write_report(args.json, rows, bandwidth)


if __name__ == "__main__":
    main()
