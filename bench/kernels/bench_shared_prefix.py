"""Attention over shared prefixes: once for each group, against FlashInfer request by request, in the same process.

    PYTHONPATH=. python3 bench/kernels/bench_shared_prefix.py [--sweep] [--json FILE]

Every request has a prefix, shared by its group, and tokens of its own. A graph of one step's attention over layers
with their own data is replayed; times are per layer. The two ways are compared with each other and with float64 first.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flashinfer
import torch

sys.path.insert(0, str(Path(__file__).parent))
from report import write_report
from timing import copy_bandwidth, percentiles, replay_times

from hardkv_sglang.config import HardKVConfig
from hardkv_sglang.kernels import reference
from hardkv_sglang.kernels.finish import finish_layer
from hardkv_sglang.kernels.shared_plan import SharedPrefixWorkspace, SharedTuning
from hardkv_sglang.kernels.shared_prefix import shared_prefix_decode
from hardkv_sglang.kernels.shared_slots import copy_shared_slots
from hardkv_sglang.lifecycle.prefix_groups import PrefixGroup
from hardkv_sglang.memory_pool.layout import PoolLayout
from hardkv_sglang.memory_pool.resolved_config import ResolvedConfig
from hardkv_sglang.memory_pool.tables import DeviceTables

L, HQ, H, D, PAGE = 8, 32, 8, 128, 32
SCALE = D**-0.5


@dataclass(frozen=True)
class Shape:
    """One batch; its groups are of the same size."""

    batch: int
    groups: int
    prefix: int  # tokens
    own: int = 256  # tokens of each request

    @property
    def saved_tokens(self) -> int:
        """Reads of a token that grouping saves."""
        return (self.batch - self.groups) * self.prefix


SHAPES = [
    Shape(64, 1, 512), Shape(64, 1, 2048), Shape(64, 1, 8192), Shape(64, 8, 512), Shape(64, 8, 2048),
    Shape(64, 8, 8192), Shape(64, 32, 512), Shape(64, 32, 2048), Shape(16, 1, 512), Shape(16, 1, 2048),
    Shape(16, 1, 8192), Shape(16, 4, 2048), Shape(4, 1, 1024), Shape(4, 1, 4096), Shape(4, 1, 16384),
    Shape(2, 1, 4096), Shape(2, 1, 16384), Shape(256, 1, 2048), Shape(256, 32, 2048),
]  # fmt: skip


class Inputs:
    """Pool, rows and queries of a shape."""

    def __init__(self, shape: Shape) -> None:
        g = torch.Generator().manual_seed(0)
        self.shape = shape
        pages = shape.groups * shape.prefix // PAGE + shape.batch * shape.own // PAGE + 1
        self.layout = PoolLayout(L, H, D, PAGE, pages * PAGE)
        order = torch.randperm(pages - 1, generator=g) + 1
        slots = (order[:, None] * PAGE + torch.arange(PAGE)).flatten().int()
        shared = slots[: shape.groups * shape.prefix].view(shape.groups, shape.prefix)
        own = slots[shape.groups * shape.prefix :].view(shape.batch, shape.own)
        group_of = torch.arange(shape.batch) % shape.groups
        self.rows = torch.arange(shape.batch, device="cuda")
        self.req_to_token = torch.cat((shared[group_of], own), 1).cuda()
        self.groups = [
            PrefixGroup(shape.prefix, tuple(range(i, shape.batch, shape.groups))) for i in range(shape.groups)
        ]
        self.k, self.v = (torch.randn(L, pages * PAGE, H, D, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        self.q = torch.randn(L, shape.batch, HQ, D, device="cuda", dtype=torch.bfloat16)
        cfg = ResolvedConfig(HardKVConfig(max_tokens=32), self.layout, HQ, SCALE, shape.batch, 1024)
        self.tables = DeviceTables.allocate(cfg, torch.bfloat16, "cuda")
        self.o, self.lse2 = torch.empty_like(self.q[0]), torch.empty(shape.batch, HQ, device="cuda")

    def flashinfer(self, start: int) -> Callable[[int], object]:
        """FlashInfer over the tokens from `start` on, as SGLang calls it: slots as pages of one token."""
        slots = self.req_to_token[:, start:]
        scratch = torch.zeros(512 << 20, dtype=torch.uint8, device="cuda")
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(scratch, "NHD", use_tensor_cores=True)
        indptr = torch.arange(self.shape.batch + 1, dtype=torch.int32) * slots.shape[1]
        last = torch.ones(self.shape.batch, dtype=torch.int32)
        kinds = {"q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16}
        wrapper.plan(indptr, slots.flatten().contiguous(), last, HQ, H, D, 1, **kinds)
        pools = [(self.k[layer, :, None], self.v[layer, :, None]) for layer in range(L)]
        return lambda layer: wrapper.run(self.q[layer], pools[layer], out=self.o, lse=self.lse2, return_lse=True)

    def shared(self, groups: list[PrefixGroup], tuning: SharedTuning) -> Callable[[int], object]:
        """Our kernels, joining into what FlashInfer wrote; nobody's query is recorded."""
        workspace = SharedPrefixWorkspace.allocate(self.layout, HQ, self.shape.batch, "cuda", tuning)
        workspace.plan(groups)
        copy_shared_slots(workspace, self.rows, self.req_to_token)

        def launch(layer: int) -> None:
            shared_prefix_decode(workspace, self.layout, self.k, self.v, layer, self.q[layer], SCALE)
            finish_layer(self.tables, workspace, layer, self.rows, self.rows, self.q[layer], (self.o, self.lse2))

        return launch

    def check(self, *calls: Callable[[int], object]) -> None:
        """Against float64, on a few requests of the last layer."""
        for call in calls:
            call(L - 1)
        for b in range(0, self.shape.batch, max(1, self.shape.batch // 5)):
            slots = self.req_to_token[b].long()
            args = (self.k[L - 1].double(), self.v[L - 1].double(), slots, SCALE)
            o, lse2 = reference.dense_decode(self.q[L - 1, b].double(), *args)
            error = float((self.o[b].double() - o).norm() / o.norm())
            assert error < 8e-3, f"{self.shape}: relative error {error}"
            torch.testing.assert_close(self.lse2[b].double(), lse2, rtol=0, atol=2e-3)


def p50(*calls: Callable[[int], object]) -> float:
    """Microseconds of one layer."""

    def launch() -> None:
        for layer in range(L):
            for call in calls:
                call(layer)

    return percentiles(replay_times(launch, L, repeats=40))["p50_us"]


def measure(shape: Shape, tuning: SharedTuning) -> dict[str, Any]:
    """One row of the table. The gates run first."""
    inputs = Inputs(shape)
    whole, own = inputs.flashinfer(0), inputs.flashinfer(shape.prefix)
    shared, nothing = inputs.shared(inputs.groups, tuning), inputs.shared([], tuning)
    inputs.check(whole)
    inputs.check(own, shared)
    inputs.check(whole, nothing)
    row: dict[str, Any] = {**vars(shape), "saved_tokens": shape.saved_tokens}
    row |= {"by_request_us": p50(whole), "grouped_us": p50(own, shared), "no_groups_us": p50(whole, nothing)}
    return {**row, "ratio": round(row["by_request_us"] / row["grouped_us"], 2)}


def sweep(shape: Shape) -> list[tuple[float, SharedTuning]]:
    """p50 of our kernel alone with each tuning, fastest first; what does not fit is left out."""
    inputs, results = Inputs(shape), []
    own = inputs.flashinfer(shape.prefix)
    for rows, block, warps, stages in [
        (64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 3), (64, 128, 4, 2), (128, 64, 8, 2),
        (128, 64, 8, 3), (128, 32, 8, 3), (32, 64, 4, 3), (32, 64, 2, 3), (16, 64, 4, 3),
    ]:  # fmt: skip
        for programs in (1, 2, 3, 4):
            tuning = SharedTuning(rows, block, warps, stages, programs)
            shared = inputs.shared(inputs.groups, tuning)
            inputs.check(own, shared)
            results.append((p50(shared), tuning))
    return sorted(results, key=lambda result: result[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sweep", action="store_true", help="print the fastest tunings of each shape instead")
    parser.add_argument("--shapes", type=int, nargs="*", help="indices into SHAPES", default=range(len(SHAPES)))
    parser.add_argument("--json", type=Path, help="also write the rows there")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.sweep:
        for shape in (SHAPES[i] for i in args.shapes):
            print(shape)
            for time, tuning in sweep(shape)[:8]:
                print("  ", time, tuning, flush=True)
        return
    bandwidth, tuning, rows = copy_bandwidth(), SharedTuning.default(2 * D, HQ // H), []
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {bandwidth / 1e12:.2f} TB/s")
    for shape in (SHAPES[i] for i in args.shapes):
        rows.append(measure(shape, tuning))
        print("  ".join(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
        torch.cuda.empty_cache()
    if args.json:
        write_report(args.json, rows, bandwidth)


if __name__ == "__main__":
    main()
