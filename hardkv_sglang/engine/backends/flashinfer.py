"""Decode attention over the tiers on top of SGLang's FlashInfer backend.

FlashInfer attends the dense tiers (prefix and recent window) with one plan per step for all layers; our ragged
kernel attends the condensed and sparse lists, another one the prefixes that requests share, and both merge by sum of
exponentials. Everything that runs inside a captured graph reads lengths and pages from device tables.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from flashinfer.decode import fast_decode_plan
from sglang.srt.layers.attention.flashinfer_backend import DecodeMetadata, FlashInferAttnBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from hardkv_sglang.engine import compat
from hardkv_sglang.kernels.dense_slots import plan_dense_slots
from hardkv_sglang.kernels.finish import finish_layer
from hardkv_sglang.kernels.packed_decode import packed_decode
from hardkv_sglang.kernels.ragged_decode import ragged_decode
from hardkv_sglang.kernels.ragged_plan import plan_ragged_decode
from hardkv_sglang.kernels.ragged_workspace import RaggedWorkspace, SplitTokens, Tuning
from hardkv_sglang.kernels.shared_plan import SharedPrefixWorkspace, SharedTuning
from hardkv_sglang.kernels.shared_prefix import shared_prefix_decode
from hardkv_sglang.kernels.shared_slots import copy_shared_slots
from hardkv_sglang.lifecycle.prefix_groups import PrefixGroup
from hardkv_sglang.memory_pool.resolved_config import ResolvedConfig
from hardkv_sglang.memory_pool.tables import DeviceTables


@dataclass(frozen=True)
class DensePages:
    """Page table of the dense tiers, handed to SGLang's planner in place of the one it would build."""

    kv_indptr: torch.Tensor  # [B + 1] int32
    kv_indices: torch.Tensor  # slots, int32


class HardKVFlashInferBackend(FlashInferAttnBackend):
    """FlashInfer whose decode reads dense, sparse and condensed tiers; prefill is untouched."""

    hardkv_cfg: ResolvedConfig
    hardkv_tables: DeviceTables
    hardkv_workspace: RaggedWorkspace
    hardkv_tuning: Tuning | None  # None: by the size of the batch
    hardkv_aged: torch.Tensor  # [B] int32 on the host, of the step about to run
    hardkv_shared: SharedPrefixWorkspace | None  # None: prefixes are attended request by request
    hardkv_dense_start: torch.Tensor  # [max_batch] int32, leading tokens that a group attends; on the device
    hardkv_groups: Sequence[PrefixGroup]  # planned in `hardkv_shared`
    hardkv_dense_start_cpu: torch.Tensor  # the same on the host

    def attach_hardkv(self, cfg: ResolvedConfig, tables: DeviceTables, max_batch: int) -> None:
        """Allocate the split-KV workspace; see `backends.TieredBackend`."""
        self.hardkv_cfg = cfg
        self.hardkv_tables = tables
        device = tables.prefix_end.device
        self.hardkv_workspace = RaggedWorkspace.allocate(
            cfg.layout,
            cfg.num_q_heads,
            max_batch,
            cfg.max_list_tokens,
            device,
            SplitTokens.fixed() if self.enable_deterministic else SplitTokens.by_load(),
        )
        self.hardkv_tuning = Tuning.many_lists() if self.enable_deterministic else None
        self.hardkv_aged = torch.zeros(0, dtype=torch.int32)
        self.hardkv_shared, self.hardkv_groups = None, ()
        self.hardkv_dense_start_cpu = torch.zeros(max_batch, dtype=torch.int32)
        self.hardkv_dense_start = self.hardkv_dense_start_cpu.to(device)
        if cfg.min_shared_tokens is not None:
            row_bytes = cfg.layout.head_dim * tables.query_ring.element_size()
            tuning = SharedTuning.default(row_bytes, cfg.group_size)
            self.hardkv_shared = SharedPrefixWorkspace.allocate(cfg.layout, cfg.num_q_heads, max_batch, device, tuning)
            self.hardkv_dense_start = self.hardkv_shared.shared_len

    @property
    def workspace_bytes(self) -> int:
        """See `backends.TieredBackend`."""
        shared = self.hardkv_shared
        return self.hardkv_workspace.num_bytes + (shared.num_bytes if shared is not None else 0)

    def set_aged_tokens(self, aged: torch.Tensor) -> None:
        """See `backends.TieredBackend`."""
        self.hardkv_aged = aged

    def set_prefix_groups(self, groups: Sequence[PrefixGroup]) -> None:
        """See `backends.TieredBackend`. On the forward stream."""
        if self.hardkv_shared is not None and groups != self.hardkv_groups:
            self.hardkv_groups = groups
            self.hardkv_dense_start_cpu = self.hardkv_shared.plan(groups)

    def forget_lists(self, rows: Iterable[int]) -> None:
        """Nothing to do: every step plans on the device's own tables."""

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Plan an eager step."""
        if not forward_batch.forward_mode.is_decode():
            super().init_forward_metadata(forward_batch)
            return
        seq_lens_cpu = forward_batch.seq_lens_cpu
        slots = torch.empty(int(seq_lens_cpu.sum()), dtype=torch.int32, device=forward_batch.seq_lens.device)
        self._plan_dense(self.decode_wrappers[0], forward_batch, slots, self.decode_split_tile_size, False)
        self.forward_metadata = DecodeMetadata(self.decode_wrappers)
        self.init_forward_metadata_in_graph(forward_batch)

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Plan a step that a captured graph will run, or the capture itself."""
        if not forward_batch.forward_mode.is_decode_or_idle():
            super().init_forward_metadata_out_graph(forward_batch, in_capture)
            return
        bs = forward_batch.batch_size
        if in_capture:
            # graphs are captured again after a weight update: the last step's requests have no part in that
            self.set_aged_tokens(torch.zeros(0, dtype=torch.int32))
            self.set_prefix_groups(())
            self._prepare_cuda_graph_metadata(bs, forward_batch.positions.numel(), forward_batch.forward_mode, None)
        (wrapper,) = self.decode_cuda_graph_metadata[bs]
        self._plan_dense(wrapper, forward_batch, wrapper._paged_kv_indices_buf, None, self.disable_cuda_graph_kv_split)
        if in_capture:
            # as stock does: the fast plan needs the module that the first plan loaded
            wrapper.begin_forward = partial(fast_decode_plan, wrapper)

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        """First node of a captured step: cut the ragged lists of all layers into work items."""
        if forward_batch.forward_mode.is_decode_or_idle():
            plan_ragged_decode(
                self.hardkv_workspace, self.hardkv_cfg.layout, self.hardkv_tables, forward_batch.req_pool_indices
            )

    def _plan_dense(
        self, wrapper: Any, batch: Any, slots: torch.Tensor, fixed_split_size: int | None, disable_split_kv: bool
    ) -> None:
        """Plan FlashInfer over the dense tiers: one host plan for all layers, no device-to-host copy."""
        bs = batch.batch_size
        rows, seq_lens = batch.req_pool_indices[:bs], batch.seq_lens[:bs]
        indptr = self.kv_indptr[0][: bs + 1]
        plan_dense_slots(
            self.req_to_token_pool.req_to_token,
            self.hardkv_tables,
            rows,
            seq_lens,
            self.hardkv_dense_start,
            indptr,
            slots,
        )
        if self.hardkv_shared is not None and self.hardkv_groups:
            copy_shared_slots(self.hardkv_shared, rows, self.req_to_token_pool.req_to_token)
        lens_cpu = batch.seq_lens_cpu[:bs] - self.hardkv_dense_start_cpu[:bs]
        # rows past the batch pad a captured graph: nothing of theirs has aged
        lens_cpu[: self.hardkv_aged.numel()] -= self.hardkv_aged
        compat.plan_decode(
            self.indices_updater_decode,
            batch,
            wrapper,
            DensePages(indptr, slots),
            req_pool_indices=rows,
            seq_lens=seq_lens,
            seq_lens_cpu=lens_cpu,
            fixed_split_size=fixed_split_size,
            disable_split_kv=disable_split_kv,
        )

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
    ) -> torch.Tensor:
        """Attention of one new token per request; q [B, HQ * D] after RoPE, returns the same shape."""
        pool, tables, index = self.token_to_kv_pool, self.hardkv_tables, layer.layer_id
        if k is not None and save_kv_cache:
            pool.set_kv_buffer(
                layer, KVWriteLoc(forward_batch.out_cache_loc, None), k, v, *self._kv_write_scales(layer)
            )
        queries = q.contiguous().view(-1, layer.tp_q_head_num, layer.head_dim)
        state = self.forward_metadata.decode_wrappers[0].forward_return_lse(
            queries, pool.get_kv_buffer(index), sm_scale=layer.scaling
        )
        if self.hardkv_shared is not None:
            shared_prefix_decode(
                self.hardkv_shared,
                self.hardkv_cfg.layout,
                pool.k_storage,
                pool.v_storage,
                index,
                queries,
                layer.scaling,
            )
        decode = packed_decode if self.hardkv_cfg.layout.survivors.is_packed else ragged_decode
        decode(
            self.hardkv_workspace,
            self.hardkv_cfg.layout,
            tables,
            self.req_to_token_pool.req_to_token,
            pool.k_storage,
            pool.v_storage,
            index,
            queries,
            layer.scaling,
            state,
            self.hardkv_tuning,
        )
        rows, seq_lens = forward_batch.req_pool_indices, forward_batch.seq_lens
        finish_layer(tables, self.hardkv_shared, index, rows, seq_lens, queries, state)
        return state[0].view(-1, layer.tp_q_head_num * layer.head_dim)
