"""Compile every kernel for an NVIDIA GPU that is not there: `python compile_all.py [ARCHITECTURE]`.

Run in a process of its own, because the other tests of this folder turn Triton's interpreter on. The public wrappers
are called as the runtime calls them, with launching replaced by compilation down to machine code.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from hardkv_sglang.config import HardKVConfig
from hardkv_sglang.kernels import finish, packed_decode, ragged_decode, shared_prefix
from hardkv_sglang.kernels.bound import bound_counts
from hardkv_sglang.kernels.condense import condense
from hardkv_sglang.kernels.dense_slots import plan_dense_slots
from hardkv_sglang.kernels.dependent_launch import FIRST_CAPABILITY
from hardkv_sglang.kernels.importance import PooledLists, measure_pooled
from hardkv_sglang.kernels.list_candidates import list_candidates
from hardkv_sglang.kernels.publish import publish
from hardkv_sglang.kernels.ragged_plan import plan_ragged_decode
from hardkv_sglang.kernels.ragged_workspace import RaggedWorkspace, SplitTokens
from hardkv_sglang.kernels.restore import restore_candidates, take_statistics
from hardkv_sglang.kernels.shared_plan import SharedPrefixWorkspace, SharedTuning
from hardkv_sglang.kernels.shared_slots import copy_shared_slots
from hardkv_sglang.lifecycle.request_state import RequestState
from hardkv_sglang.lifecycle.step_plan import SelectOp
from hardkv_sglang.memory_pool.layout import PoolLayout
from hardkv_sglang.memory_pool.rank_memory import RankMemory
from hardkv_sglang.memory_pool.resolved_config import ResolvedConfig
from hardkv_sglang.memory_pool.tables import DeviceTables

OPTIONS = ("num_warps", "num_stages", "launch_pdl")
TYPES = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64",
    torch.uint8: "*u8", torch.int16: "*i16", torch.bool: "*i1", float: "fp32", int: "i32",
}  # fmt: skip


SELECT = SelectOp(
    state=RequestState(1, 32, 32, 64, 100), row=1,
    prefix_end=32, condensed_end=32, old_recent_start=64, recent_start=96, first_query=100,
    seq_len=104, condensed_list_bound=40, recalibrate=False, ring_slot=0,
)  # fmt: skip


class Compiler:
    """Stands in for `JITFunction.run`."""

    def __init__(self, architecture: int) -> None:
        self.target = GPUTarget("cuda", architecture, 32)
        self.done: list[str] = []

    def run(self, kernel: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        """Compile the kernel for these arguments."""
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        given = {**{p.name: value for p, value in zip(kernel.params, args, strict=False)}, **kwargs}
        signature, constants = {}, {}
        for parameter in kernel.params:
            value = given[parameter.name]
            if parameter.is_constexpr:
                signature[parameter.name], constants[parameter.name] = "constexpr", value
            else:
                signature[parameter.name] = TYPES[value.dtype if isinstance(value, torch.Tensor) else type(value)]
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        binary = triton.compile(source, target=self.target, options=options)
        self.done.append(f"{kernel.__name__}: {len(binary.asm['cubin'])} bytes, {binary.metadata.shared} bytes shared")


def call_every_wrapper(head_dim: int, group: int, dtype: torch.dtype) -> None:
    """One call of each kernel's public function."""
    layout = PoolLayout(num_layers=2, num_kv_heads=2, head_dim=head_dim, page_size=32, num_slots=320)
    cfg = ResolvedConfig(HardKVConfig(max_tokens=256, remembered_weight=0.5), layout, 2 * group, 0.1, 5, 1024)
    tables = DeviceTables.allocate(cfg, dtype, "cpu")
    k, v = (torch.zeros(2, 320, 2, head_dim, dtype=dtype) for _ in range(2))
    req_to_token = torch.zeros(5, 1024, dtype=torch.int32)
    rows, seq_lens = torch.tensor([1, 2]), torch.tensor([7, 9])
    q, lse2 = torch.zeros(2, 2 * group, head_dim, dtype=dtype), torch.zeros(2, 2 * group)
    workspace = RaggedWorkspace.allocate(layout, 2 * group, 4, 1024, "cpu", SplitTokens.by_load())
    plan_ragged_decode(workspace, layout, tables, rows)
    state = (torch.zeros_like(q), lse2)
    ragged_decode.ragged_decode(workspace, layout, tables, req_to_token, k, v, 1, q, 0.1, state)
    shared = SharedPrefixWorkspace.allocate(layout, 2 * group, 4, "cpu", SharedTuning.default(2 * head_dim, group))
    copy_shared_slots(shared, rows, req_to_token)
    shared_prefix.shared_prefix_decode(shared, layout, k, v, 1, q, 0.1)
    for workspace_or_none in (shared, None):
        finish.finish_layer(tables, workspace_or_none, 1, rows, seq_lens, q, state)
    condense(k, v, layout, tables, req_to_token, rows, torch.zeros(2, 3, dtype=torch.int64))
    rows_of = torch.zeros(4, 100, dtype=torch.int64)
    lists = PooledLists(
        valid=rows_of == 0,
        k_rows=k.view(-1, head_dim),
        v_rows=v.view(-1, head_dim),
        rows=rows_of,
        padding=rows_of[0, :4].int(),
    )
    queries = torch.zeros(4, 16 * group, head_dim, dtype=dtype)
    importance = measure_pooled(lists, lists.valid, queries, torch.zeros(4, 16 * group), 0.1)
    lists.value_distance(importance.mean)
    found = list_candidates(RankMemory(cfg, tables, k, v, req_to_token), SELECT, slice(0, 2))
    keep = bound_counts(found.valid, torch.zeros(found.valid.shape), found.valid, 8, 64, 32)
    publish(tables, SELECT, keep, torch.zeros(4))
    slots = torch.zeros(64, dtype=torch.int32)
    lens, indptr = torch.zeros(4, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
    plan_dense_slots(req_to_token, tables, rows, seq_lens, lens, indptr, slots)


def call_packed(bits: int, head_dim: int, group: int, dtype: torch.dtype) -> None:
    """Kernels of packed survivors."""
    layout = PoolLayout(2, 2, head_dim, 32, 320, survivor_bits=bits)
    options = HardKVConfig(max_tokens=256, survivor_bits=bits)
    cfg = ResolvedConfig(options, layout, 2 * group, 0.1, 5, 1024)
    tables = DeviceTables.allocate(cfg, dtype, "cpu")
    k, v = (torch.zeros(2, 320, 2, head_dim, dtype=dtype) for _ in range(2))
    req_to_token = torch.zeros(5, 1024, dtype=torch.int32)
    q = torch.zeros(2, 2 * group, head_dim, dtype=dtype)
    state = (torch.zeros_like(q), torch.zeros(2, 2 * group))
    workspace = RaggedWorkspace.allocate(layout, 2 * group, 4, 1024, "cpu", SplitTokens.by_load())
    packed_decode.packed_decode(workspace, layout, tables, req_to_token, k, v, 1, q, 0.1, state)
    rows = torch.tensor([1, 2])
    condense(k, v, layout, tables, req_to_token, rows, torch.zeros(2, 3, dtype=torch.int64))
    memory = RankMemory(cfg, tables, k, v, req_to_token)
    take_statistics(memory, 1)
    restore_candidates(memory, SELECT, slice(0, 2), list_candidates(memory, SELECT, slice(0, 2)))


def main() -> None:
    """Print what was compiled."""
    compiler = Compiler(int(sys.argv[1]) if len(sys.argv) > 1 else 90)
    if compiler.target.arch >= 10 * FIRST_CAPABILITY:
        # there is no device to ask, so that wrappers would launch as on an older one
        for module in (finish, packed_decode, ragged_decode, shared_prefix):
            vars(module)["launch_options"] = lambda device: {"PDL": True, "launch_pdl": True}
    JITFunction.run = lambda kernel, *args, **kwargs: compiler.run(kernel, *args, **kwargs)
    for head_dim, group, dtype, bits in ((128, 4, torch.bfloat16, 4), (64, 3, torch.float16, 8)):
        call_every_wrapper(head_dim, group, dtype)
        call_packed(bits, head_dim, group, dtype)
    print("\n".join(compiler.done))


if __name__ == "__main__":
    main()
