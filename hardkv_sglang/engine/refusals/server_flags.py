"""Server flags and environment variables that HARD-KV does not work with."""

from __future__ import annotations

import os
from typing import Any

from hardkv_sglang.config import SUPPORTED_PAGE_SIZES
from hardkv_sglang.engine.refusals import Refusal

SUPPORTED_KV_CACHE_DTYPES = ("auto", "bf16", "bfloat16", "fp16", "float16")
SUPPORTED_DECODE_GRAPHS = ("full", "disabled")
ATTENTION_BACKEND_OF_DEVICE = {"cuda": "flashinfer", "cpu": "torch_native"}


def refused_server_flags(server_args: Any) -> list[str]:
    """Messages of every refused flag and environment variable; empty if the server may start.

    server_args: the values in effect, see `compat.resolved_flags`, for example inside `check_server_args`.
    """
    return [row.message for row in SERVER_REFUSALS if row.predicate(server_args)]


def _flag(field: str) -> str:
    # the rule by which SGLang derives a flag from a field
    return "--" + field.replace("_", "-")


def _switch(field: str, why: str) -> Refusal:
    """A flag that must be absent: off, unset or empty."""
    message = f"{_flag(field)}: {why}; remove {_flag(field)}"
    return Refusal(field, lambda args: bool(getattr(args, field)), message)


def _newer_switch(field: str, why: str) -> Refusal:
    """A flag that must be absent, and that not every release has."""
    message = f"{_flag(field)}: {why}; remove {_flag(field)}"
    return Refusal(field, lambda args: bool(getattr(args, field, False)), message)


def _choice(field: str, allowed: tuple[Any, ...], why: str, remedy: str) -> Refusal:
    """A flag that must have one of some values."""
    message = f"{_flag(field)}: {why}; use {_flag(field)} {remedy}"
    return Refusal(field, lambda args: getattr(args, field) not in allowed, message)


def _environment(name: str, why: str) -> Refusal:
    """An environment variable that must be off."""
    return Refusal(name, lambda _: _is_on(name), f"{name}=1: {why}; unset {name}")


def _is_on(name: str) -> bool:
    # the spellings of SGLang's EnvBool
    return os.environ.get(name, "").lower() in ("true", "1", "yes", "y")


def _decode_backend(args: Any) -> str | None:
    return args.decode_attention_backend or args.attention_backend


def _prefill_backend(args: Any) -> str | None:
    return args.prefill_attention_backend or args.attention_backend


def _has_wrong_backend(args: Any, device: str) -> bool:
    return args.device == device and _decode_backend(args) != ATTENTION_BACKEND_OF_DEVICE[device]


SERVER_REFUSALS: tuple[Refusal, ...] = (
    # device, attention kernels, KV storage
    _choice(
        "device",
        tuple(ATTENTION_BACKEND_OF_DEVICE),
        "KV compression runs on NVIDIA GPUs and on the CPU only",
        "cuda or --device cpu",
    ),
    Refusal(
        "attention_backend",
        lambda args: _has_wrong_backend(args, "cuda"),
        "--attention-backend: KV compression decodes through FlashInfer only; use "
        "--attention-backend flashinfer and leave out --decode-attention-backend",
    ),
    Refusal(
        "decode_attention_backend",
        lambda args: _has_wrong_backend(args, "cpu"),
        "--attention-backend: with --device cpu KV compression decodes through torch only; use "
        "--attention-backend torch_native and leave out --decode-attention-backend",
    ),
    Refusal(
        "prefill_attention_backend",
        lambda args: _prefill_backend(args) != _decode_backend(args),
        "--prefill-attention-backend: prefill and decode must share one attention backend; leave out "
        "--prefill-attention-backend and --decode-attention-backend",
    ),
    _choice(
        "page_size",
        SUPPORTED_PAGE_SIZES,
        f"KV compression needs pages of {', '.join(map(str, SUPPORTED_PAGE_SIZES))} tokens",
        "32",
    ),
    _choice("kv_cache_dtype", SUPPORTED_KV_CACHE_DTYPES, "quantised KV cannot be compressed", "auto or bfloat16"),
    Refusal(
        "cuda_graph_config",
        lambda args: args.cuda_graph_config.decode.backend not in SUPPORTED_DECODE_GRAPHS,
        "--cuda-graph-backend-decode: decode is captured as one full graph or not at all; use "
        "--cuda-graph-backend-decode full or disabled",
    ),
    _switch("enable_torch_compile", "compressed decode attention cannot be traced"),
    _switch("enable_page_major_kv_layout", "KV compression has a page layout of its own"),
    _switch("enable_unified_memory", "it replaces the KV pool that compression pages"),
    _switch("enable_memory_saver", "releasing KV memory would drop compressed requests"),
    # batches that are not plain decode batches of one model
    _switch("enable_mixed_chunk", "it decodes through prefill attention, which reads freed slots"),
    _switch("enable_two_batch_overlap", "it splits a decode batch between two attention backends"),
    _switch("enable_pdmux", "prefill and decode would run on concurrent streams"),
    _switch("speculative_algorithm", "speculative decoding moves KV slots of its own"),
    _switch("dllm_algorithm", "diffusion language models do not decode token by token"),
    _switch("enable_mis", "multi-item scoring has no decode to compress"),
    _switch("is_embedding", "embedding servers have no decode to compress"),
    _switch("prefill_only_disable_kv_cache", "there is no KV cache to compress"),
    _switch("encoder_only", "encoder servers have no decode to compress"),
    # parallelism
    _choice("pp_size", (1,), "pipeline parallelism splits the layers of one page", "1 with --tp-size"),
    _choice("dcp_size", (1,), "decode context parallelism splits the tokens of one page", "1"),
    _choice("attn_cp_size", (1,), "context parallelism splits the tokens of one page", "1"),
    _switch("enable_dp_attention", "ranks with different requests cannot plan events together"),
    # since 0.5.22 --enable-dp-attention resolves to this, and itself to False
    Refusal(
        "attn_dp_size",
        lambda args: (getattr(args, "attn_dp_size", None) or 1) > 1,
        "--attn-dp-size: ranks with different requests cannot plan events together; use --attn-dp-size 1 and leave out "
        "--enable-dp-attention",
    ),
    _choice("elastic_ep_backend", (None, "none"), "ranks that join late miss compressed requests", "none"),
    _choice("disaggregation_mode", ("null",), "KV transfer between servers reads freed slots", "null"),
    _newer_switch("enable_pd_role_switch", "KV transfer between servers reads freed slots"),  # since 0.5.21
    _switch("use_ray", "SGLang's Ray actors load no plugins"),
    # caches that copy or keep KV by slot
    _switch("enable_hierarchical_cache", "host loads may overwrite slots that compression just freed"),
    _switch("hicache_storage_backend", "host loads may overwrite slots that compression just freed"),
    _switch("enable_lmcache", "LMCache stores whole requests, compressed KV included"),
    _switch("enable_flexkv", "FlexKV stores whole requests, compressed KV included"),
    # since 0.5.20
    _newer_switch("enable_unified_cache_external_linker", "it stores whole requests, compressed KV included"),
    _newer_switch("enable_kv_cache_sharding", "it splits the tokens of one page"),  # since 0.5.22
    _switch("radix_cache_backend", "only SGLang's default radix cache is known to keep KV exact"),
    _switch("enable_streaming_session", "the next turn would read freed slots"),
    _switch("enable_session_radix_cache", "sessions would keep compressed KV"),
    _switch("enable_hisparse", "it is another owner of the KV pool"),
    # host data indexed by KV slot
    _switch("enable_return_routed_experts", "it indexes data by KV slot, and slots are reused"),
    _switch("enable_return_indexer_topk", "it indexes data by KV slot, and slots are reused"),
    _choice("kv_canary", ("none",), "it checks slots that compression has freed", "none"),
    # environment variables
    Refusal(
        "SGLANG_USE_CPU_ENGINE",
        lambda args: args.device == "cpu" and _is_on("SGLANG_USE_CPU_ENGINE"),
        "SGLANG_USE_CPU_ENGINE=1: it replaces the CPU platform that KV compression needs; unset SGLANG_USE_CPU_ENGINE",
    ),
    _environment("SGLANG_USE_HND_KVCACHE", "KV compression needs slot-major KV"),
    _environment("SGLANG_ENABLE_POST_CAPTURE_KV_SIZING", "captured decode keeps the size of the pool"),
    _environment("SGLANG_EXPERIMENTAL_CPP_RADIX_TREE", "only SGLang's default radix cache is known to keep KV exact"),
    _environment("SGLANG_ENABLE_UNIFIED_RADIX_TREE", "only SGLang's default radix cache is known to keep KV exact"),
    _environment("SGLANG_RUST_SERVER", "KV compression is untested with the embedded Rust server"),
)
