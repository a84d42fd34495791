"""What is taken out of the pool's share before the pool exists is what is allocated later, to the byte."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hardkv_sglang.config import HardKVConfig
from hardkv_sglang.kernels import shared_plan
from hardkv_sglang.kernels.footprint import Footprint
from hardkv_sglang.kernels.ragged_workspace import RaggedWorkspace, SplitTokens
from hardkv_sglang.kernels.shared_plan import SharedPrefixWorkspace, SharedTuning
from hardkv_sglang.memory_pool.layout import PoolLayout
from hardkv_sglang.memory_pool.resolved_config import ResolvedConfig
from hardkv_sglang.memory_pool.tables import DeviceTables


@st.composite
def configurations(draw: st.DrawFn) -> ResolvedConfig:
    """Shapes small enough to allocate on the meta device without thought."""
    layout = PoolLayout(
        draw(st.integers(1, 80)), draw(st.integers(1, 16)), draw(st.sampled_from([64, 128, 256])),
        draw(st.sampled_from([16, 32, 64])), draw(st.integers(1, 1 << 20)),
    )  # fmt: skip
    options = HardKVConfig(
        max_tokens=draw(st.sampled_from([None, 1024, 4096])), query_window=draw(st.integers(1, 64)),
        select_interval=draw(st.integers(64, 1024)), uniform_tokens=32,
    )  # fmt: skip
    heads = layout.num_kv_heads * draw(st.integers(1, 8))
    shared = draw(st.sampled_from([None, 49152]))
    return ResolvedConfig(
        options, layout, heads, 1.0, draw(st.integers(2, 4097)), draw(st.integers(64, 131072)), shared
    )


@given(configurations(), st.sampled_from([torch.bfloat16, torch.float32]), st.booleans())
@settings(deadline=None, max_examples=50)
def test_footprint_is_what_will_be_allocated(cfg: ResolvedConfig, dtype: torch.dtype, fixed: bool) -> None:
    split, device = SplitTokens.fixed() if fixed else SplitTokens.by_load(), "meta"
    tables, batch = DeviceTables.allocate(cfg, dtype, device), cfg.num_rows - 1
    workspaces = RaggedWorkspace.allocate(
        cfg.layout, cfg.num_q_heads, batch, cfg.max_list_tokens, device, split
    ).num_bytes
    if cfg.min_shared_tokens is not None:
        tuning = SharedTuning.default(cfg.layout.head_dim * dtype.itemsize, cfg.group_size)
        shared = SharedPrefixWorkspace.allocate(cfg.layout, cfg.num_q_heads, batch, device, tuning)
        workspaces += shared.num_bytes
    footprint = Footprint.of(cfg, dtype, 1, split)
    assert footprint.tables + footprint.rings == tables.num_bytes
    assert footprint.rings == tables.query_ring.nbytes + tables.lse2_ring.nbytes
    assert footprint.workspaces == workspaces
    assert footprint.total == tables.num_bytes + workspaces
    assert Footprint.of(cfg, dtype, 0, split).total == tables.num_bytes


def test_items_of_a_bigger_gpu_take_more() -> None:
    layout = PoolLayout(36, 8, 128, 32, 400_000)
    few, many = (shared_plan.most_items(layout, 32, 256, SharedTuning.default(256, 4), n) for n in (1, 132))
    assert many == few + 16


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    cfg = ResolvedConfig(HardKVConfig(), PoolLayout(4, 8, 128, 32, 4096), 32, 1.0, 33, 8192, 49152)
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    tuning = SharedTuning.default(256, 4)
    ragged = RaggedWorkspace.allocate(cfg.layout, 32, 32, cfg.max_list_tokens, "cuda", SplitTokens.by_load())
    shared = SharedPrefixWorkspace.allocate(cfg.layout, 32, 32, "cuda", tuning)
    footprint = Footprint.of(cfg, torch.bfloat16, processors, SplitTokens.by_load())
    assert footprint.workspaces == ragged.num_bytes + shared.num_bytes
