"""Kinds of models that HARD-KV cannot compress."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hardkv_sglang.engine.refusals import Predicate, Refusal

SUPPORTED_KV_TORCH_DTYPES = ("torch.bfloat16", "torch.float16", "torch.float32")
KERNEL_HEAD_SIZES = (64, 128, 256)
MLA_MESSAGE = "models with multi-head latent attention (MLA) keep no per-head KV; remove --kv-compression"
FULL_ATTENTION_LAYERS = ("attention", "full_attention")


def refused_model(model_runner: Any) -> list[str]:
    """Messages of every reason why the loaded model cannot be compressed; empty if it can.

    model_runner: SGLang's `ModelRunner` after the model is loaded and the KV dtype is resolved, or the
    `KVCacheConfigurator` that it has by then: what is read here has the same names there.
    """
    return [row.message for row in MODEL_REFUSALS if row.predicate(model_runner)]


def refused_architecture(model_config: Any) -> list[str]:
    """Messages that need the configuration only, so that nothing is loaded first; empty if it may be compressed.

    model_config: SGLang's `ModelConfig`. On a CPU stock fails while it builds such a model, with a message of its own.
    """
    return [MLA_MESSAGE] if _is_mla(model_config) else []


def _is_mla(model_config: Any) -> bool:
    return model_config.attention_arch.name == "MLA"


def _attention_layers(model_runner: Any) -> Iterator[Any]:
    # RadixAttention by name, subclasses included: importing it would tie this file to SGLang
    for module in model_runner.model.modules():
        if any(cls.__name__ == "RadixAttention" for cls in type(module).__mro__):
            yield module


def _any_layer(test: Predicate) -> Predicate:
    return lambda runner: any(test(layer) for layer in _attention_layers(runner))


def _hf_configs(model_runner: Any) -> tuple[Any, Any]:
    return model_runner.model_config.hf_config, model_runner.model_config.hf_text_config


def _has_recurrent_layers(model_runner: Any) -> bool:
    if model_runner.model_config.linear_attn_registry_result:
        return True
    for config in _hf_configs(model_runner):
        # looked up on the class: the property itself needs SGLang's parallel state
        if hasattr(type(config), "mamba2_cache_params"):
            layer_types = getattr(config, "layer_types", None) or ["mamba"]
            return any(kind not in FULL_ATTENTION_LAYERS for kind in layer_types)
    return False


def _has_cross_attention(model_runner: Any) -> bool:
    if model_runner.model_config.is_encoder_decoder:
        return True
    return any(layer.is_cross_attention for layer in _attention_layers(model_runner))


def _has_sliding_window(model_runner: Any) -> bool:
    config = model_runner.model_config
    if config.is_hybrid_swa or config.attention_chunk_size:
        return True
    return any(layer.sliding_window_size > 0 for layer in _attention_layers(model_runner))


def _has_sinks(model_runner: Any) -> bool:
    if model_runner.model_config.has_attention_sinks:
        return True
    # sinks are passed to the attention call, so a loaded parameter is the only general sign of them
    names = (name.rpartition(".")[2] for name, _ in model_runner.model.named_parameters())
    return any(name == "sinks" or "attention_sink" in name for name in names)


def _has_sparse_indexer(model_runner: Any) -> bool:
    return any(getattr(config, "sparse_attention_config", None) for config in _hf_configs(model_runner))


def _has_uneven_layers(model_runner: Any) -> bool:
    shapes = {(layer.tp_k_head_num, layer.qk_head_dim) for layer in _attention_layers(model_runner)}
    return len(shapes) > 1


def _on_gpu(test: Predicate) -> Predicate:
    # the kernels' limits: attention in torch has none of them
    return lambda runner: runner.device != "cpu" and test(runner)


def _has_odd_head_size(model_runner: Any) -> bool:
    return any(layer.qk_head_dim not in KERNEL_HEAD_SIZES for layer in _attention_layers(model_runner))


def _has_two_dtypes(model_runner: Any) -> bool:
    return model_runner.kv_cache_dtype != model_runner.model_config.dtype


MODEL_REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "embedding",
        lambda runner: not runner.model_config.is_generation,
        "embedding and reward models have no decode to compress; remove --kv-compression",
    ),
    Refusal(
        "mla",
        lambda runner: _is_mla(runner.model_config),
        MLA_MESSAGE,
    ),
    Refusal(
        "mamba",
        _has_recurrent_layers,
        "hybrid models with Mamba or linear-attention layers are not supported; remove --kv-compression",
    ),
    Refusal(
        "encoder_decoder",
        _has_cross_attention,
        "encoder-decoder models and cross attention are not supported; remove --kv-compression",
    ),
    Refusal(
        "sliding_window",
        _has_sliding_window,
        "models with sliding-window or chunked attention layers are not supported; remove --kv-compression",
    ),
    Refusal(
        "attention_sinks",
        _has_sinks,
        "models with learned attention sinks are not supported; remove --kv-compression",
    ),
    Refusal(
        "logit_cap",
        _any_layer(lambda layer: layer.logit_cap > 0 or layer.xai_temperature_len > 0),
        "models that cap or rescale attention logits are not supported; remove --kv-compression",
    ),
    Refusal(
        "sparse_attention",
        _has_sparse_indexer,
        "models with their own sparse attention are not supported; remove --kv-compression",
    ),
    Refusal(
        "head_dim",
        _any_layer(lambda layer: layer.qk_head_dim != layer.v_head_dim),
        "models whose K and V heads differ in size are not supported; remove --kv-compression",
    ),
    Refusal(
        "uneven_layers",
        _has_uneven_layers,
        "models whose layers differ in KV heads or head size are not supported; remove --kv-compression",
    ),
    Refusal(
        "kv_dtype",
        lambda runner: str(runner.kv_cache_dtype) not in SUPPORTED_KV_TORCH_DTYPES,
        "the checkpoint asks for quantised KV, which cannot be compressed; use --kv-cache-dtype bfloat16",
    ),
    Refusal(
        "head_size",
        _on_gpu(_has_odd_head_size),
        f"the kernels know heads of {', '.join(map(str, KERNEL_HEAD_SIZES))} elements only; remove --kv-compression",
    ),
    Refusal(
        "two_dtypes",
        _on_gpu(_has_two_dtypes),
        "queries and KV must have one dtype on a GPU; leave out --kv-cache-dtype, or set it to that of --dtype",
    ),
)
