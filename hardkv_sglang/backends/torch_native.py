"""Decode attention over the tiers on top of SGLang's `torch_native` backend: the reference path, on a CPU."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from hardkv_sglang.kernels.cpu_attend import LOG2_E, GatherBuffer, LayerRows, RequestRows, attend
from hardkv_sglang.memory_pool.tables import DeviceTables
from hardkv_sglang.prefix_groups import PrefixGroup
from hardkv_sglang.resolved_config import ResolvedConfig


@dataclass(frozen=True)
class DecodeRow:
    """One request of a decode batch."""

    seq_len: int
    is_compressed: bool  # else stock attention serves
    live: list[LayerRows]  # by layer; empty where only stock attention is needed
    ring_slot: int  # where its query and LSE go in the observation ring; -1: nowhere

    @property
    def is_observed(self) -> bool:
        """Whether its query and LSE are recorded."""
        return self.ring_slot >= 0


class HardKVTorchNativeBackend(TorchNativeAttnBackend):
    """`torch_native` whose decode reads dense, sparse and condensed tiers; requests without an event take the
    stock path, operation for operation."""

    hardkv_cfg: ResolvedConfig
    hardkv_tables: DeviceTables
    hardkv_rows: list[DecodeRow]
    hardkv_request_rows: dict[int, RequestRows]  # by request row, of the last step's requests
    hardkv_buffer: GatherBuffer

    def attach_hardkv(self, cfg: ResolvedConfig, tables: DeviceTables, max_batch: int) -> None:
        """See `backends.TieredBackend`."""
        self.hardkv_cfg = cfg
        self.hardkv_tables = tables
        self.hardkv_rows = []
        self.hardkv_request_rows = {}
        self.hardkv_buffer = GatherBuffer(self.token_to_kv_pool.k_storage)

    @property
    def workspace_bytes(self) -> int:
        """See `backends.TieredBackend`."""
        return 0

    @property
    def _attention_dtype(self) -> torch.dtype:
        return torch.promote_types(self.token_to_kv_pool.k_storage.dtype, torch.float32)

    def forget_lists(self, rows: Iterable[int]) -> None:
        """See `backends.TieredBackend`."""
        for row in rows:
            self.hardkv_request_rows.pop(row, None)

    def set_hidden_tokens(self, hidden: torch.Tensor) -> None:
        """Nothing to do: this backend plans on the device's own tables."""

    def set_prefix_groups(self, groups: Sequence[PrefixGroup]) -> None:
        """Nothing to do: each request is attended on its own, as stock does it."""

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Read each request's tiers once per step."""
        super().init_forward_metadata(forward_batch)
        if not forward_batch.forward_mode.is_decode():
            return
        rows, seq_lens = forward_batch.req_pool_indices.tolist(), forward_batch.seq_lens.tolist()
        self.hardkv_rows = [self._decode_row(row, seq_len) for row, seq_len in zip(rows, seq_lens, strict=True)]
        self.hardkv_request_rows = {
            row: self.hardkv_request_rows[row] for row in rows if row in self.hardkv_request_rows
        }

    def _decode_row(self, row: int, seq_len: int) -> DecodeRow:
        tables = self.hardkv_tables
        is_compressed, ring_slot = int(tables.recent_start[row]) > 0, int(tables.ring_slot[row])
        needs_rows = is_compressed or ring_slot >= 0
        live = self._request_rows(row, seq_len).layers() if needs_rows else []
        return DecodeRow(seq_len, is_compressed, live, ring_slot)

    def _request_rows(self, row: int, seq_len: int) -> RequestRows:
        layout, req_to_token = self.hardkv_cfg.layout, self.req_to_token_pool.req_to_token
        found = self.hardkv_request_rows.get(row)
        if found is None or not found.grow(layout, req_to_token[row, found.seq_len : seq_len]):
            found = RequestRows.find(layout, self.hardkv_tables, req_to_token, row, seq_len, self._attention_dtype)
            self.hardkv_request_rows[row] = found
        return found

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
    ) -> torch.Tensor:
        """Attention of one new token per request; q [bs, HQ * D] after RoPE, returns the same shape."""
        if not any(r.live for r in self.hardkv_rows):
            return super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache)
        if save_kv_cache and k is not None and v is not None:
            self.token_to_kv_pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, None), k, v)
        queries = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        o = torch.empty_like(queries)
        for i, request in enumerate(self.hardkv_rows):
            if not request.is_compressed:
                self._stock_decode(queries, o, i, layer, forward_batch)
            if request.live:
                self._tiered_decode(queries[i], o[i], request, layer)
        return o.view(q.shape[0], -1)

    def _stock_decode(self, queries: torch.Tensor, o: torch.Tensor, i: int, layer: Any, forward_batch: Any) -> None:
        self._run_sdpa_forward_decode(
            queries[i : i + 1],
            o[i : i + 1],
            self.token_to_kv_pool.get_key_buffer(layer.layer_id),
            self.token_to_kv_pool.get_value_buffer(layer.layer_id),
            self.req_to_token_pool.req_to_token,
            forward_batch.req_pool_indices[i : i + 1],
            forward_batch.seq_lens[i : i + 1],
            scaling=layer.scaling,
            enable_gqa=layer.tp_q_head_num != layer.tp_k_head_num,
            causal=False,
        )

    def _tiered_decode(self, q: torch.Tensor, o: torch.Tensor, request: DecodeRow, layer: Any) -> None:
        """Attend all tiers, into `o` if the request is compressed, and fill the observation ring if it is observed."""
        tables, pool, live = self.hardkv_tables, self.token_to_kv_pool, request.live[layer.layer_id]
        tiers, lse = attend(q, pool.k_storage, pool.v_storage, live, layer.scaling, self.hardkv_buffer)
        if request.is_compressed:
            o.view(tiers.shape).copy_(tiers)
        if request.is_observed:
            index = (request.seq_len - 1) % self.hardkv_cfg.options.query_window
            tables.query_ring[layer.layer_id, request.ring_slot, index] = q
            tables.lse2_ring[layer.layer_id, request.ring_slot, index] = lse.flatten() * LOG2_E
