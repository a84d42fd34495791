"""Latent KV of models with multi-head latent attention (MLA)."""

from __future__ import annotations

from typing import Any

from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool


class LatentKVPool(MLATokenToKVPool):
    """Stock's pool, with the one argument more that SGLang gives out-of-tree pools."""

    def __init__(self, *args: Any, index_head_dim: None = None, **kwargs: Any) -> None:
        """index_head_dim: of sparse attention, which has a pool of its own; None here. Others: see the stock pool."""
        super().__init__(*args, **kwargs)
