"""Decode attention over the tiers on top of SGLang's `torch_native` backend: the reference path, on a CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from hardkv_sglang.config import ResolvedConfig
from hardkv_sglang.kernels import reference
from hardkv_sglang.kernels.cpu_attend import attend
from hardkv_sglang.memory_pool.tables import DeviceTables


@dataclass(frozen=True)
class DecodeRow:
    """One request of a decode batch."""

    row: int
    seq_len: int
    slots: torch.Tensor | None  # dense-tier slots of a compressed request; None where stock attention serves
    ragged: list[tuple[torch.Tensor, torch.Tensor]]  # its `ragged_rows` by layer
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

    def attach_hardkv(self, cfg: ResolvedConfig, tables: DeviceTables, max_batch: int) -> None:
        """See `backends.TieredBackend`."""
        self.hardkv_cfg = cfg
        self.hardkv_tables = tables
        self.hardkv_rows = []

    def set_hidden_tokens(self, hidden: torch.Tensor) -> None:
        """Nothing to do: this backend plans on the device's own tables."""

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Read each request's tiers once per step."""
        super().init_forward_metadata(forward_batch)
        if not forward_batch.forward_mode.is_decode():
            return
        tables, req_to_token = self.hardkv_tables, self.req_to_token_pool.req_to_token
        self.hardkv_rows = []
        for row, seq_len in zip(forward_batch.req_pool_indices.tolist(), forward_batch.seq_lens.tolist(), strict=True):
            slots, ragged = None, []
            if int(tables.recent_start[row]) > 0:
                slots = reference.dense_slots(req_to_token, tables, row, seq_len)
                ragged = reference.ragged_rows_by_layer(self.hardkv_cfg.layout, tables, req_to_token, row)
            self.hardkv_rows.append(DecodeRow(row, seq_len, slots, ragged, int(tables.ring_slot[row])))

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
        if all(r.slots is None and not r.is_observed for r in self.hardkv_rows):
            return super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache)
        if save_kv_cache and k is not None and v is not None:
            self.token_to_kv_pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, None), k, v)
        queries = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        o = torch.empty_like(queries)
        for i, request in enumerate(self.hardkv_rows):
            if request.slots is None:
                self._stock_decode(queries, o, i, layer, forward_batch)
            if request.slots is not None or request.is_observed:
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
        """Merge the tiers into `o` (compressed requests) and fill the observation ring (observed ones)."""
        tables, pool = self.hardkv_tables, self.token_to_kv_pool
        req_to_token = self.req_to_token_pool.req_to_token
        slots = req_to_token[request.row, : request.seq_len] if request.slots is None else request.slots
        k_buffer, v_buffer = pool.get_kv_buffer(layer.layer_id)
        state = reference.dense_decode(q, k_buffer, v_buffer, slots, layer.scaling, attend)
        if request.slots is not None:
            rows, counts = request.ragged[layer.layer_id]
            ragged = reference.attend_rows(q, pool.k_storage, pool.v_storage, rows, counts, layer.scaling, attend)
            state = reference.merge_states(state, ragged)
            o.copy_(state[0])
        if request.is_observed:
            index = (request.seq_len - 1) % self.hardkv_cfg.options.query_window
            tables.query_ring[layer.layer_id, request.ring_slot, index] = q
            tables.lse2_ring[layer.layer_id, request.ring_slot, index] = state[1]
