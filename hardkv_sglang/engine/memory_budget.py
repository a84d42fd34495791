"""Takes what compression needs beside the pool out of the pool's share, before SGLang sizes the pool."""

from __future__ import annotations

import logging
from typing import Any

from hardkv_sglang.config import HardKVConfig
from hardkv_sglang.engine import compat
from hardkv_sglang.engine.assembly import resolve_config
from hardkv_sglang.kernels.footprint import Footprint
from hardkv_sglang.kernels.ragged_workspace import SplitTokens
from hardkv_sglang.memory_pool.layout import PoolLayout

logger = logging.getLogger(__name__)

LARGE_SHARE = 0.2  # of the pool's memory, from which an operator should hear of it
REMEDY = "lower --max-running-requests, or max_tokens of --kv-compression-config, or raise --mem-fraction-static"


def left_for_pool(options: HardKVConfig, configurator: Any, available: int) -> int:
    """Bytes of `available` that the pool may take.

    configurator: SGLang's `KVCacheConfigurator`, once the model is loaded. Equal on all tensor-parallel ranks.
    Raises `ValueError`, with figures and remedy, when a pool and the tables do not fit together.
    """
    limit = compat.resolved_flags(configurator.server_args).max_total_tokens
    if limit is not None and configurator.device == "cpu":
        # the operator sized the pool, and host memory is taken only as it is written
        return available
    capacity = compat.pool_tokens(configurator, available)
    footprint, requests = _footprint(options, configurator, capacity, min(capacity, limit or capacity))
    left = available - footprint.total
    tokens = compat.pool_tokens(configurator, left) if left > 0 else 0
    figures = figures_of(footprint, requests, available)
    refuse_shortage(tokens, capacity, limit, figures)
    if limit is None and footprint.total > LARGE_SHARE * available:
        logger.warning("HARD-KV takes a large share of the pool's memory: %s; to change that, %s", figures, REMEDY)
    return left


def figures_of(footprint: Footprint, requests: int, available: int) -> str:
    """What compression takes, for how many requests and out of what."""
    return f"{footprint} for {requests} requests, out of {available / 1e9:.2f} GB that SGLang would give the pool"


def refuse_shortage(tokens: int, capacity: int, limit: int | None, figures: str) -> None:
    """Raise `ValueError` if the pool gets no token, or fewer than an operator asked for who could have them dense.

    tokens: of the pool beside the tables; capacity: without them; limit: `--max-total-tokens`.
    """
    if tokens == 0:
        raise ValueError(f"HARD-KV: nothing is left for the pool ({figures}); {REMEDY}")
    if limit is not None and tokens < limit <= capacity:
        raise ValueError(
            f"HARD-KV: --max-total-tokens {limit} does not fit beside its tables ({figures}): {tokens} tokens do; "
            f"lower --max-total-tokens to that, or {REMEDY}"
        )


def _footprint(options: HardKVConfig, configurator: Any, capacity: int, tokens: int) -> tuple[Footprint, int]:
    """What compression takes, and the requests it is for, if the pool has at most so many tokens.

    The pool will be smaller, by what is taken out, so that SGLang may admit fewer requests: this is an upper bound.
    """
    attention = compat.attention_layers(configurator.model)
    layout = PoolLayout(
        num_layers=len(attention),
        num_kv_heads=attention[0].tp_k_head_num,
        head_dim=attention[0].qk_head_dim,
        page_size=configurator.page_size,
        num_slots=capacity + configurator.page_size,
        element_bytes=configurator.kv_cache_dtype.itemsize,
    )
    requests = compat.most_requests(configurator, tokens)
    cfg = resolve_config(options, configurator, layout, requests + 1)
    exact = compat.resolved_flags(configurator.server_args).enable_deterministic_inference
    split = SplitTokens.fixed() if exact else SplitTokens.by_load()
    multiprocessors = compat.num_multiprocessors(configurator)
    return Footprint.of(cfg, configurator.model_dtype, multiprocessors, split), requests
