"""Puts one rank's runtime together from what SGLang has built: model, pool and attention backend."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

import torch

from hardkv_sglang.config import HardKVConfig
from hardkv_sglang.engine import compat
from hardkv_sglang.engine.backends import install_backend
from hardkv_sglang.engine.runtime import HardKVRuntime
from hardkv_sglang.events.executor import EventExecutor
from hardkv_sglang.memory_pool.layout import PoolLayout
from hardkv_sglang.memory_pool.rank_memory import RankMemory
from hardkv_sglang.memory_pool.resolved_config import ResolvedConfig
from hardkv_sglang.memory_pool.tables import DeviceTables
from hardkv_sglang.selection.priors import check_options, load_priors

logger = logging.getLogger(__name__)


@dataclass
class Attachment:
    """What the hooks hold: the options from the start, the runtime from when the model is loaded."""

    options: HardKVConfig
    attached: HardKVRuntime | None = None

    @property
    def runtime(self) -> HardKVRuntime:
        """The rank's runtime. Raises `RuntimeError` before the attention backend exists."""
        if self.attached is None:
            raise RuntimeError("HARD-KV: SGLang used a request before it had built its attention backend")
        return self.attached

    def attach(self, model_runner: Any) -> None:
        """Build the runtime. Call before CUDA graphs are captured."""
        self.attached = build_runtime(self.options, model_runner)


def build_runtime(options: HardKVConfig, model_runner: Any) -> HardKVRuntime:
    """Allocate tables, take over decode attention, run both kinds of events once on the padding row, and compile.

    Raises `TypeError` for an attention backend that we do not extend, `PriorsError` for priors of another model.
    """
    pool = model_runner.token_to_kv_pool
    req_to_token = model_runner.req_to_token_pool.req_to_token
    cfg = resolve_config(options, model_runner, pool.head_page_layout, req_to_token.shape[0])
    tables = DeviceTables.allocate(cfg, model_runner.dtype, req_to_token.device)
    memory = RankMemory(cfg, tables, pool.k_storage, pool.v_storage, req_to_token)
    executor = EventExecutor(memory, compat.tensor_parallel_group(), _read_priors(cfg, model_runner))
    runtime = HardKVRuntime(executor, install_backend(model_runner, cfg, tables))
    executor.warm_up()
    runtime.admission.warm_up()
    logger.info(
        "HARD-KV: %s, %d rows; beside the pool of %.2f GB: %s; CUDA graphs for up to %d requests, "
        "SGLang logs their memory when they are captured",
        options, cfg.num_rows, (pool.k_storage.nbytes + pool.v_storage.nbytes) / 1e9, runtime.footprint,
        compat.max_graph_batch(model_runner),
    )  # fmt: skip
    return runtime


def resolve_config(options: HardKVConfig, owner: Any, layout: PoolLayout, num_rows: int) -> ResolvedConfig:
    """The options with the shapes of this rank's model and pool; owner: of the model, its config and server_args.

    Raises `ValueError` for `survivor_bits` that pages of this size cannot hold.
    """
    attention = compat.attention_layers(owner.model)[0]
    return ResolvedConfig(
        options=options,
        layout=replace(layout, survivor_bits=options.survivor_bits),
        num_q_heads=attention.tp_q_head_num,
        softmax_scale=attention.scaling,
        num_rows=num_rows,
        max_context_len=owner.model_config.context_len,
        min_shared_tokens=options.min_shared_tokens if compat.can_share_prefixes(owner) else None,
    )


def _read_priors(cfg: ResolvedConfig, model_runner: Any) -> torch.Tensor | None:
    """Temperatures of this rank's KV heads, [L, H] on the pool's device."""
    if cfg.options.priors is None:
        return None
    for difference in check_options(cfg.options.priors, cfg.options.to_dict()):
        logger.warning("HARD-KV: %s", difference)
    layout, total = cfg.layout, model_runner.model_config.get_total_num_kv_heads()
    temperature = load_priors(
        cfg.options.priors,
        model_name=model_runner.model_config.model_path,
        num_layers=layout.num_layers,
        num_kv_heads_global=total,
    )
    first = compat.first_kv_head(model_runner, total, layout.num_kv_heads)
    return temperature[:, first : first + layout.num_kv_heads].to(model_runner.req_to_token_pool.req_to_token.device)
