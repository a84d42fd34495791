"""Pool, tables and CUDA graphs of a start, computed from shapes; nothing is allocated."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from hardkv_sglang.config import HardKVConfig
from hardkv_sglang.engine.memory_budget import LARGE_SHARE, REMEDY, figures_of, refuse_shortage
from hardkv_sglang.engine.preflight import OK, WARN, Finding
from hardkv_sglang.kernels.footprint import Footprint
from hardkv_sglang.kernels.ragged_workspace import SplitTokens
from hardkv_sglang.memory_pool.layout import PoolLayout
from hardkv_sglang.memory_pool.resolved_config import ResolvedConfig


@dataclass(frozen=True)
class PoolShare:
    """What SGLang will give the pool of one rank: it profiles the loaded model, this is an estimate."""

    available: int  # bytes
    token_bytes: int
    page_size: int
    limit: int | None  # --max-total-tokens

    @property
    def capacity(self) -> int:
        """Tokens that the share holds, limit aside."""
        return self.tokens(self.available)

    def tokens(self, num_bytes: int) -> int:
        """Whole pages of `num_bytes`, in tokens."""
        return max(0, num_bytes) // self.token_bytes // self.page_size * self.page_size

    def limited(self, tokens: int) -> int:
        """At most what the operator asks for, in whole pages."""
        return tokens if self.limit is None else min(tokens, self.limit // self.page_size * self.page_size)


def inspect_memory(options: HardKVConfig, config: Any, server_args: Any, kv_dtype: torch.dtype) -> list[Finding]:
    """The pool of one rank, what compression takes out of its share, and CUDA graphs."""
    layout = PoolLayout(
        num_layers=config.num_attention_layers,
        num_kv_heads=config.get_num_kv_heads(server_args.tp_size),
        head_dim=config.head_dim,
        page_size=server_args.page_size,
        num_slots=0,
    )
    weights = weight_bytes(config.model_path) // server_args.tp_size
    share = PoolShare(
        available=int(free_memory(server_args.device) * (server_args.mem_fraction_static or 0.0)) - weights,
        token_bytes=2 * layout.columns * layout.head_dim * kv_dtype.itemsize,
        page_size=layout.page_size,
        limit=server_args.max_total_tokens,
    )
    # as SGLang bounds the requests that run at a time
    requests = min(server_args.max_running_requests, share.limited(share.capacity) // 2)
    can_share = not server_args.disable_radix_cache and not server_args.enable_deterministic_inference
    cfg = ResolvedConfig(
        options=options,
        layout=replace(
            layout,
            num_slots=share.capacity + layout.page_size,
            survivor_bits=options.survivor_bits,
            element_bytes=kv_dtype.itemsize,
        ),
        num_q_heads=config.num_attention_heads // server_args.tp_size,
        softmax_scale=layout.head_dim**-0.5,
        num_rows=requests + 1,
        max_context_len=config.context_len,
        min_shared_tokens=options.min_shared_tokens if can_share else None,
    )
    findings = [judge(share, footprint_of(cfg, config.dtype, server_args), requests, server_args.device)]
    if server_args.device == "cuda":
        largest = server_args.cuda_graph_config.decode.max_bs or 0
        text = f"for up to {largest} requests; the log has their size once they are captured (Capture ... end)"
        findings.append(Finding(OK, "CUDA graphs", text))
    return findings


def footprint_of(cfg: ResolvedConfig, dtype: torch.dtype, server_args: Any) -> Footprint:
    """What compression will take beside the pool; dtype: that of the queries."""
    on_gpu = server_args.device == "cuda"
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count if on_gpu else 0
    exact = server_args.enable_deterministic_inference
    return Footprint.of(cfg, dtype, multiprocessors, SplitTokens.fixed() if exact else SplitTokens.by_load())


def judge(share: PoolShare, footprint: Footprint, requests: int, device: str) -> Finding:
    """Pool and tables together, by the rules of `engine/memory_budget.py`."""
    figures = figures_of(footprint, requests, share.available)
    # a pool that the operator sized on a CPU is left as it is
    taken = 0 if device == "cpu" and share.limit is not None else footprint.total
    tokens = share.tokens(share.available - taken)
    try:
        refuse_shortage(tokens, share.capacity, share.limit, figures)
    except ValueError as error:
        return Finding.refused("memory", str(error))
    pool = share.limited(tokens)
    text, values = f"pool of about {pool} tokens; {figures}", {"pool_tokens": pool, "table_bytes": footprint.total}
    if share.limit is None and footprint.total > LARGE_SHARE * share.available:
        return Finding(WARN, "memory", f"{text}, a large share", REMEDY, values)
    return Finding(OK, "memory", text, values=values)


def free_memory(device: str) -> int:
    """Free bytes of the device that a server would take."""
    return torch.cuda.mem_get_info()[0] if device == "cuda" else int(psutil.virtual_memory().available)


def weight_bytes(model_path: str) -> int:
    """Bytes of a checkpoint's weights on this disk; 0 for one that is not here."""
    folder = Path(model_path)
    files = list(folder.glob("*.safetensors")) or list(folder.glob("*.bin"))
    return sum(file.stat().st_size for file in files)
