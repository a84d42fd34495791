"""Decode attention over the tiers, as subclasses of SGLang's attention backends.

The existing backend instance is re-classed in place after SGLang built it: prefill, prefix caching and every
check of the backend's name or type stay SGLang's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch

from hardkv_sglang.lifecycle.prefix_groups import PrefixGroup
from hardkv_sglang.memory_pool.resolved_config import ResolvedConfig
from hardkv_sglang.memory_pool.tables import DeviceTables


class TieredBackend(Protocol):
    """What the runtime asks of a re-classed backend."""

    @property
    def workspace_bytes(self) -> int:
        """Device memory of the backend's own, in bytes."""

    def attach_hardkv(self, cfg: ResolvedConfig, tables: DeviceTables, max_batch: int) -> None:
        """Take over the tables; called once, before CUDA graphs are captured."""

    def set_aged_tokens(self, aged: torch.Tensor) -> None:
        """Tokens of each request that have left its dense tiers, [B] int32 on the host, for the next decode step."""

    def set_prefix_groups(self, groups: Sequence[PrefixGroup]) -> None:
        """Requests of the next decode step whose shared prefix is attended once."""

    def forget_lists(self, rows: Iterable[int]) -> None:
        """Events rewrote the lists of these request rows, or the rows have new requests."""


def install_backend(model_runner: Any, cfg: ResolvedConfig, tables: DeviceTables) -> TieredBackend:
    """Re-class the runner's attention backend in place and return it.

    Raises `TypeError` when the backend is not exactly one that we extend.
    """
    backend = model_runner.attn_backend
    name = f"{type(backend).__module__}.{type(backend).__qualname__}"
    if name == "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend":
        from hardkv_sglang.engine.backends.torch_native import HardKVTorchNativeBackend as Tiered
    elif name == "sglang.srt.layers.attention.flashinfer_backend.FlashInferAttnBackend":
        from hardkv_sglang.engine.backends.flashinfer import HardKVFlashInferBackend as Tiered
    else:
        raise TypeError(f"HARD-KV cannot serve decode through {name}; use --attention-backend flashinfer")
    backend.__class__ = Tiered
    backend.attach_hardkv(cfg, tables, model_runner.req_to_token_pool.size)
    tiered: TieredBackend = backend
    return tiered
