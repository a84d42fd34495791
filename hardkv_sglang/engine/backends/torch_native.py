"""Decode attention over the tiers on top of SGLang's `torch_native` backend: the reference path, on a CPU."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from hardkv_sglang.kernels import reference
from hardkv_sglang.kernels.cpu_attend import RaggedRows, attend
from hardkv_sglang.kernels.cpu_packed import PackedBatch, PackedLists, attend_packed, join_packed
from hardkv_sglang.kernels.cpu_rows import RequestLists, join_dense, join_lists
from hardkv_sglang.lifecycle.prefix_groups import PrefixGroup
from hardkv_sglang.memory_pool.resolved_config import ResolvedConfig
from hardkv_sglang.memory_pool.tables import DeviceTables


@dataclass(frozen=True)
class TieredStep:
    """A decode step's requests that are compressed, or whose query and LSE are recorded."""

    in_batch: torch.Tensor  # [A] int64, their index in the batch
    compressed: torch.Tensor  # [C] int64, those of A that are compressed; stock attention serves the others
    dense: RaggedRows  # of A * HQ queries, in the storage of one layer
    lists: list[RaggedRows]  # by layer, condensed (unless packed) and sparse, in the whole storage
    packed: list[PackedBatch]  # by layer, condensed; empty where survivors are not packed
    rows: torch.Tensor  # [A] int64, their request rows
    recorded: torch.Tensor  # [O] int64, those of A whose query and LSE are recorded
    ring_slot: torch.Tensor  # [O] int64
    ring_index: torch.Tensor  # [O] int64


class HardKVTorchNativeBackend(TorchNativeAttnBackend):
    """`torch_native` whose decode reads dense, sparse and condensed tiers; requests without an event take the
    stock path, operation for operation."""

    hardkv_cfg: ResolvedConfig
    hardkv_tables: DeviceTables
    hardkv_step: TieredStep | None  # None: stock attention serves all requests
    hardkv_stock_requests: list[int]  # which it serves otherwise, by their index in the batch
    hardkv_lists: dict[int, RequestLists]  # by request row, of the last step's requests
    hardkv_packed: dict[int, PackedLists]  # the same of packed survivors
    hardkv_joined: tuple[tuple[int, ...], list[RaggedRows], list[PackedBatch]]  # lists of these request rows, by layer

    def attach_hardkv(self, cfg: ResolvedConfig, tables: DeviceTables, max_batch: int) -> None:
        """See `backends.TieredBackend`."""
        self.hardkv_cfg = cfg
        self.hardkv_tables = tables
        self.hardkv_step = None
        self.hardkv_stock_requests = []
        self.hardkv_lists = {}
        self.hardkv_packed = {}
        self.hardkv_joined = (), [], []

    @property
    def workspace_bytes(self) -> int:
        """See `backends.TieredBackend`."""
        return 0

    def forget_lists(self, rows: Iterable[int]) -> None:
        """See `backends.TieredBackend`."""
        for row in rows:
            self.hardkv_lists.pop(row, None)
            self.hardkv_packed.pop(row, None)
        self.hardkv_joined = (), [], []

    def set_aged_tokens(self, aged: torch.Tensor) -> None:
        """Nothing to do: this backend plans on the device's own tables."""

    def set_prefix_groups(self, groups: Sequence[PrefixGroup]) -> None:
        """Nothing to do: each request is attended on its own, as stock does it."""

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Read each request's tiers once per step."""
        super().init_forward_metadata(forward_batch)
        if not forward_batch.forward_mode.is_decode():
            return
        rows = forward_batch.req_pool_indices
        is_compressed = self.hardkv_tables.recent_start.index_select(0, rows) > 0
        ring_slot = self.hardkv_tables.ring_slot.index_select(0, rows)
        in_use = rows.tolist()
        self.hardkv_lists = {row: self.hardkv_lists[row] for row in in_use if row in self.hardkv_lists}
        self.hardkv_packed = {row: self.hardkv_packed[row] for row in in_use if row in self.hardkv_packed}
        self.hardkv_stock_requests = (~is_compressed).nonzero().flatten().tolist()
        tiered = (is_compressed | (ring_slot >= 0)).nonzero().flatten()
        self.hardkv_step = (
            self._tiered_step(
                tiered, rows[tiered], forward_batch.seq_lens[tiered], is_compressed[tiered], ring_slot[tiered]
            )
            if tiered.numel()
            else None
        )

    def _tiered_step(
        self,
        in_batch: torch.Tensor,
        rows: torch.Tensor,
        seq_lens: torch.Tensor,
        is_compressed: torch.Tensor,
        ring_slot: torch.Tensor,
    ) -> TieredStep:
        """All arguments: [A], one element per request that stock attention does not serve alone."""
        recorded = (ring_slot >= 0).nonzero().flatten()
        lists, packed = self._join_lists(tuple(rows.tolist()))
        return TieredStep(
            in_batch=in_batch,
            compressed=is_compressed.nonzero().flatten(),
            dense=self._join_dense(rows.tolist(), seq_lens.tolist()),
            lists=lists,
            packed=packed,
            rows=rows,
            recorded=recorded,
            ring_slot=ring_slot[recorded].long(),
            ring_index=(seq_lens[recorded] - 1) % self.hardkv_cfg.options.query_window,
        )

    @property
    def _group(self) -> int:
        return self.hardkv_cfg.num_q_heads // self.hardkv_cfg.layout.num_kv_heads

    @property
    def _attention_dtype(self) -> torch.dtype:
        return torch.promote_types(self.token_to_kv_pool.k_storage.dtype, torch.float32)

    def _join_dense(self, rows: Sequence[int], seq_lens: Sequence[int]) -> RaggedRows:
        tables, req_to_token = self.hardkv_tables, self.req_to_token_pool.req_to_token
        requests = zip(rows, seq_lens, strict=True)
        slots = [reference.dense_slots(req_to_token, tables, row, seq_len) for row, seq_len in requests]
        return join_dense(slots, self.hardkv_cfg.layout, self._group, self._attention_dtype)

    def _join_lists(self, rows: tuple[int, ...]) -> tuple[list[RaggedRows], list[PackedBatch]]:
        """Lists of these request rows, which are read again only after an event and joined for another batch."""
        if self.hardkv_joined[0] != rows:
            layout, req_to_token = self.hardkv_cfg.layout, self.req_to_token_pool.req_to_token
            is_packed, kind = layout.survivors.is_packed, self._attention_dtype
            for row in rows:
                if row not in self.hardkv_lists:
                    self.hardkv_lists[row] = RequestLists.read(layout, self.hardkv_tables, req_to_token, row)
                    if is_packed:
                        self.hardkv_packed[row] = PackedLists.read(layout, self.hardkv_tables, row)
            lists = join_lists([self.hardkv_lists[row] for row in rows], layout, self._group, kind)
            packed = [self.hardkv_packed[row] for row in rows] if is_packed else []
            self.hardkv_joined = rows, lists, join_packed(packed, self._group, kind) if packed else []
        return self.hardkv_joined[1:]

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
        if self.hardkv_step is None:
            return super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache)
        if save_kv_cache and k is not None and v is not None:
            self.token_to_kv_pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, None), k, v)
        queries = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        o = torch.empty_like(queries)
        for i in self.hardkv_stock_requests:
            self._stock_decode(queries, o, i, layer, forward_batch)
        self._tiered_decode(queries, o, self.hardkv_step, layer)
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

    def _tiered_decode(self, queries: torch.Tensor, o: torch.Tensor, step: TieredStep, layer: Any) -> None:
        """Attend all tiers, into `o` where a request is compressed, and fill the observation ring.

        queries, o: [bs, HQ, D].
        """
        tables, pool, index = self.hardkv_tables, self.token_to_kv_pool, layer.layer_id
        q = queries.index_select(0, step.in_batch)
        flat, scale = q.flatten(0, 1), layer.scaling
        k_rows, v_rows = (x.view(x.shape[0], -1, x.shape[-1]) for x in (pool.k_storage, pool.v_storage))
        dense = attend(flat, k_rows[index], v_rows[index], step.dense, scale)
        lists = attend(flat, k_rows.flatten(0, 1), v_rows.flatten(0, 1), step.lists[index], scale)
        if step.packed:
            condensed = attend_packed(
                q, pool.k_storage, pool.v_storage, self.hardkv_cfg.layout, tables, index, step.rows,
                step.packed[index], scale,
            )  # fmt: skip
            lists = reference.merge_states(condensed, lists)
        tiers, lse2 = reference.merge_states(dense, lists)
        o[step.in_batch[step.compressed]] = tiers.view(q.shape)[step.compressed].to(o.dtype)
        tables.query_ring[index, step.ring_slot, step.ring_index] = q[step.recorded]
        tables.lse2_ring[index, step.ring_slot, step.ring_index] = lse2.view(q.shape[:2])[step.recorded].float()
