"""Device memory that compression takes beside the pool, from shapes alone: nothing is allocated."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

import torch

from hardkv_sglang.kernels import ragged_workspace, shared_plan
from hardkv_sglang.kernels.ragged_workspace import SplitTokens
from hardkv_sglang.kernels.shared_plan import SharedTuning
from hardkv_sglang.memory_pool.resolved_config import ResolvedConfig
from hardkv_sglang.memory_pool.tables import table_bytes


@dataclass(frozen=True)
class Footprint:
    """Bytes of one rank."""

    tables: int
    rings: int
    workspaces: int  # of the decode kernels; none on a CPU

    @property
    def total(self) -> int:
        """All of it."""
        return self.tables + self.rings + self.workspaces

    def __str__(self) -> str:
        parts = {"tables": self.tables, "observation rings": self.rings, "workspaces": self.workspaces}
        return ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in parts.items())

    @classmethod
    def of(cls, cfg: ResolvedConfig, dtype: torch.dtype, multiprocessors: int, split: SplitTokens) -> Footprint:
        """What `DeviceTables` and the workspaces of the decode kernels will take.

        dtype: that of queries and pool; multiprocessors: of the GPU, 0 on a CPU; split: see `RaggedWorkspace`.
        """
        tables, rings = table_bytes(cfg, dtype)
        return cls(tables, rings, _workspaces(cfg, dtype, multiprocessors, split) if multiprocessors else 0)


def _workspaces(cfg: ResolvedConfig, dtype: torch.dtype, multiprocessors: int, split: SplitTokens) -> int:
    max_batch, heads = cfg.num_rows - 1, cfg.num_q_heads
    splits = ragged_workspace.most_splits(cfg.max_list_tokens, split)
    size = _num_bytes(ragged_workspace.workspace_shapes(cfg.layout, heads, max_batch, splits).values())
    if cfg.min_shared_tokens is None:
        return size
    tuning = SharedTuning.default(cfg.layout.head_dim * dtype.itemsize, cfg.group_size)
    max_items = shared_plan.most_items(cfg.layout, heads, max_batch, tuning, multiprocessors)
    return size + _num_bytes(shared_plan.workspace_shapes(cfg.layout, max_batch, max_items, tuning).values())


def _num_bytes(shapes: Iterable[tuple[tuple[int, ...], torch.dtype]]) -> int:
    return sum(prod(shape) * kind.itemsize for shape, kind in shapes)
