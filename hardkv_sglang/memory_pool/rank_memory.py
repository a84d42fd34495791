"""What one rank's events read and write on its device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hardkv_sglang.memory_pool.layout import PoolLayout
from hardkv_sglang.memory_pool.resolved_config import ResolvedConfig
from hardkv_sglang.memory_pool.tables import DeviceTables


@dataclass(frozen=True)
class RankMemory:
    """Pool and tables of a rank. Pool and `req_to_token` are SGLang's; who writes what: see `tables.py`."""

    cfg: ResolvedConfig
    tables: DeviceTables
    k_storage: torch.Tensor  # [L, S, H, D] contiguous
    v_storage: torch.Tensor  # [L, S, H, D] contiguous
    req_to_token: torch.Tensor  # [R, max_context_len] int32

    @property
    def layout(self) -> PoolLayout:
        """Shapes of the pool."""
        return self.cfg.layout

    @property
    def k_rows(self) -> torch.Tensor:
        """Keys as storage rows, [L * S * H, D]."""
        return self.k_storage.view(-1, self.layout.head_dim)

    @property
    def v_rows(self) -> torch.Tensor:
        """Values as storage rows, [L * S * H, D]."""
        return self.v_storage.view(-1, self.layout.head_dim)

    @property
    def is_on_gpu(self) -> bool:
        """Whether events run as Triton kernels."""
        return self.k_storage.is_cuda
