"""Flags that are in effect, and the model that they name.

Read on 0.5.17 to 0.5.23. Up to 0.5.18 SGLang resolves `ServerArgs` in place; since 0.5.19 the object keeps what the
operator typed, and what follows from it is read through a view. Whoever reads raw fields there takes None for a flag
that was left to SGLang, and misses what only resolution turns on.
"""

from __future__ import annotations

from typing import Any


def resolved_flags(server_args: Any) -> Any:
    """`ServerArgs` with every value as it is in effect; for reading only."""
    try:
        from sglang.srt.arg_groups.model_override_base import resolving_view
    except ImportError:
        return server_args
    return resolving_view(server_args)


def resolve(server_args: Any) -> Any:
    """`resolved_flags` of arguments that nobody has resolved yet. Raises what SGLang raises at flags it refuses."""
    if hasattr(server_args, "resolve_once"):
        server_args.resolve_once()
    return resolved_flags(server_args)


def model_config_of(server_args: Any) -> Any:
    """SGLang's `ModelConfig` of these arguments, as given: not of a view of them."""
    if hasattr(server_args, "get_model_config"):
        return server_args.get_model_config()
    from sglang.srt.arg_groups.model_override_base import model_config_of as config_of

    return config_of(server_args)


def can_share_prefixes(owner: Any) -> bool:
    """Whether decode may attend a prefix for several requests at once: there is a radix tree, and results may depend
    on the batch."""
    flags = resolved_flags(owner.server_args)
    return not flags.disable_radix_cache and not flags.enable_deterministic_inference


def max_graph_batch(model_runner: Any) -> int:
    """Requests of the largest decode batch that gets a CUDA graph; 0 without graphs."""
    decode = resolved_flags(model_runner.server_args).cuda_graph_config.decode
    has_graphs = model_runner.device != "cpu" and decode.backend != "disabled"
    return int(decode.max_bs or 0) if has_graphs else 0


def checks_every_step() -> bool:
    """Whether SGLang runs with its strict memory checks, which prove every page of every step and end the server."""
    from sglang.srt.environ import envs

    busy, pages = envs.SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY, envs.SGLANG_CHECK_KV_PAGE_INVARIANTS
    return bool(busy.get() or pages.get())
