"""The loaded model, its rank and its pool.

Read on 0.5.17 to 0.5.23. `ModelRunner.ps`, the rank's place among others, is gone since 0.5.21, where
`runtime_context.get_parallel` has the same fields.
"""

from __future__ import annotations

from typing import Any

import torch


def attention_layers(model: torch.nn.Module) -> list[Any]:
    """The model's `RadixAttention` modules, in layer order."""
    from sglang.srt.layers.radix_attention import RadixAttention

    return [module for module in model.modules() if isinstance(module, RadixAttention)]


def tensor_parallel_group() -> torch.distributed.ProcessGroup | None:
    """Process group of the tensor-parallel ranks; None when there is one rank."""
    from sglang.srt.distributed import get_tp_group

    group = get_tp_group()
    return group.device_group if group.world_size > 1 else None


def first_kv_head(model_runner: Any, total_kv_heads: int, num_kv_heads: int) -> int:
    """Global index of this tensor-parallel rank's first KV head; ranks share heads when there are too few."""
    if hasattr(model_runner, "ps"):
        ranks = model_runner.ps
    else:
        from sglang.srt.runtime_context import get_parallel

        ranks = get_parallel()
    return int(ranks.tp_rank * num_kv_heads * total_kv_heads // max(total_kv_heads, ranks.tp_size))


def pool_tokens(configurator: Any, num_bytes: int) -> int:
    """Tokens of a pool of so many bytes, by SGLang's own rule; without the limit that the operator may have set."""
    from sglang.srt.model_executor.pool_configurator import create_memory_pool_configurator

    sizes = create_memory_pool_configurator(configurator).calculate_pool_sizes(num_bytes, configurator.page_size)
    return int(sizes.max_total_num_tokens)


def most_requests(configurator: Any, num_tokens: int) -> int:
    """Requests that SGLang will let run at a time on a pool of so many tokens."""
    return int(configurator.resolve_max_num_reqs(num_tokens))


def num_multiprocessors(configurator: Any) -> int:
    """Of the GPU that the configurator sizes a pool for; 0 on a CPU."""
    if configurator.device == "cpu":
        return 0
    return int(torch.cuda.get_device_properties(configurator.gpu_id).multi_processor_count)


def metric_labels(scheduler: Any) -> dict[str, Any] | None:
    """Labels of SGLang's own scheduler metrics; None without `--enable-metrics`, or if another rank reports."""
    context = scheduler.metrics_collector_context
    return context.collector.labels if context.current_scheduler_metrics_enabled else None
