"""SGLang's MHA token pool with K and V as one storage each, so that a page can hold any (layer, head) list."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.constants import GPU_MEMORY_TYPE_KV_CACHE
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from hardkv_sglang.memory_pool.layout import PoolLayout


class HeadPagedTokenToKVPool(MHATokenToKVPool):
    """`MHATokenToKVPool` whose per-layer buffers are views of `[num_layers, num_slots, num_kv_heads, head_dim]`.

    SGLang reads and writes the views exactly as it does the stock buffers; the memory used is the same.
    """

    k_storage: torch.Tensor  # [L, S, H, D]
    v_storage: torch.Tensor  # [L, S, H, D]

    def _create_buffers_normal(self) -> None:
        k_shape, v_shape = self._kv_buffer_shapes()
        if k_shape != v_shape:
            raise ValueError(f"HARD-KV needs equal K and V head sizes, got {k_shape[-1]} and {v_shape[-1]}")
        options: dict[str, Any] = {"dtype": self.store_dtype, "device": self.device}
        with self.memory_saver_adapter.region(GPU_MEMORY_TYPE_KV_CACHE):
            self.k_storage = torch.zeros((self.layer_num, *k_shape), **options)
            self.v_storage = torch.zeros((self.layer_num, *v_shape), **options)
        self.k_buffer = list(self.k_storage.unbind(0))
        self.v_buffer = list(self.v_storage.unbind(0))

    def _clear_buffers(self) -> None:
        super()._clear_buffers()
        del self.k_storage, self.v_storage

    @property
    def head_page_layout(self) -> PoolLayout:
        """Shapes of the storage, for head-page addressing."""
        num_layers, num_slots, num_heads, head_dim = self.k_storage.shape
        element_bytes = self.k_storage.element_size()
        return PoolLayout(num_layers, num_heads, head_dim, self.page_size, num_slots, element_bytes=element_bytes)
