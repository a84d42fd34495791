"""Every row of the refusal tables, against real `ServerArgs`, model configs and attention layers."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.environ import envs
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.server_args import ServerArgs
from torch import nn

from hardkv_sglang.engine import compat
from hardkv_sglang.engine.arguments import refuse_unsupported
from hardkv_sglang.engine.refusals.models import MODEL_REFUSALS, refused_model
from hardkv_sglang.engine.refusals.server_flags import SERVER_REFUSALS, refused_server_flags
from hardkv_sglang.engine.refusals.table import refusals_table
from hardkv_sglang.generated import insert_generated

DOCUMENT = Path(__file__).parents[2] / "docs" / "refusals.md"

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 1024,
    "torch_dtype": "bfloat16",
}

# Flags that SGLang itself accepts on this machine: the real constructor resolves them.
CONSTRUCTED: dict[str, dict[str, Any]] = {
    "device": {"device": "xpu", "attention_backend": "torch_native"},
    "decode_attention_backend": {"attention_backend": "triton"},
    "prefill_attention_backend": {"prefill_attention_backend": "triton"},
    "page_size": {"page_size": 8},
    "kv_cache_dtype": {"kv_cache_dtype": "fp8_e5m2"},
    "cuda_graph_config": {"cuda_graph_backend_decode": "breakable"},
    "enable_memory_saver": {"enable_memory_saver": True},
    "enable_mixed_chunk": {"enable_mixed_chunk": True},
    "enable_two_batch_overlap": {"enable_two_batch_overlap": True},
    "enable_pdmux": {"enable_pdmux": True},
    "is_embedding": {"is_embedding": True},
    "pp_size": {"pp_size": 2},
    "dcp_size": {"dcp_size": 2},
    "attn_cp_size": {"attn_cp_size": 2, "tp_size": 2},
    "enable_dp_attention": {"enable_dp_attention": True, "dp_size": 2, "tp_size": 2},
    "elastic_ep_backend": {"elastic_ep_backend": "mooncake"},
    "disaggregation_mode": {"disaggregation_mode": "decode"},
    "use_ray": {"use_ray": True},
    "enable_hierarchical_cache": {"enable_hierarchical_cache": True},
    "hicache_storage_backend": {"hicache_storage_backend": "file"},
    "enable_lmcache": {"enable_lmcache": True},
    "enable_flexkv": {"enable_flexkv": True},
    "radix_cache_backend": {"radix_cache_backend": "flexkv"},
    "enable_streaming_session": {"enable_streaming_session": True},
    "enable_session_radix_cache": {"enable_session_radix_cache": True},
    "enable_hisparse": {"enable_hisparse": True},
    "enable_return_routed_experts": {"enable_return_routed_experts": True},
    "enable_return_indexer_topk": {"enable_return_indexer_topk": True},
    "kv_canary": {"kv_canary": "log"},
}

# Flags that SGLang refuses by itself on a CPU or for this model: set on resolved arguments.
FORCED: dict[str, dict[str, Any]] = {
    "enable_torch_compile": {"enable_torch_compile": True},
    "attention_backend": {"device": "cuda", "attention_backend": "triton"},
    "enable_page_major_kv_layout": {"enable_page_major_kv_layout": True},
    "enable_unified_memory": {"enable_unified_memory": True},
    "speculative_algorithm": {"speculative_algorithm": "NGRAM"},
    "dllm_algorithm": {"dllm_algorithm": "LowConfidence"},
    "enable_mis": {"enable_mis": True},
    "prefill_only_disable_kv_cache": {"prefill_only_disable_kv_cache": True},
    "encoder_only": {"encoder_only": True},
    "attn_dp_size": {"attn_dp_size": 2},
    "enable_kv_cache_sharding": {"enable_kv_cache_sharding": True},
    "enable_pd_role_switch": {"enable_pd_role_switch": True},
    "enable_unified_cache_external_linker": {"enable_unified_cache_external_linker": True},
}

# Rows whose flag, choice or variable not every release has.
NEWER = {"attn_dp_size", "enable_kv_cache_sharding", "enable_pd_role_switch", "enable_unified_cache_external_linker"}
GONE = {"SGLANG_EXPERIMENTAL_CPP_RADIX_TREE", "SGLANG_ENABLE_UNIFIED_RADIX_TREE"}  # since 0.5.21

ENVIRONMENT = [row.name for row in SERVER_REFUSALS if row.name.isupper()]

BASE = {"device": "cpu", "page_size": 32, "dtype": "float32"}


def save_config(folder: Path, config: dict[str, Any]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_config(tmp_path_factory.mktemp("llama"), LLAMA)


def server_args(folder: str, **flags: Any) -> Any:
    """The flags in effect."""
    return compat.resolve(ServerArgs(model_path=folder, **{**BASE, **flags}))


class Forced:
    """Flags with some values that no command line gives."""

    def __init__(self, args: Any, values: dict[str, Any]) -> None:
        self.args, self.values = args, values

    def __getattr__(self, name: str) -> Any:
        return self.values[name] if name in self.values else getattr(self.args, name)


FIELDS = set(getattr(ServerArgs, "__struct_fields__", ())) or {field.name for field in dataclasses.fields(ServerArgs)}


def message_of(name: str) -> str:
    (row,) = (row for row in (*SERVER_REFUSALS, *MODEL_REFUSALS) if row.name == name)
    return row.message


def test_server_flags_default_is_accepted(llama_folder: str) -> None:
    assert refused_server_flags(server_args(llama_folder)) == []


@pytest.mark.parametrize("page_size", [16, 32, 64])
def test_server_flags_supported_pages_are_accepted(llama_folder: str, page_size: int) -> None:
    assert refused_server_flags(server_args(llama_folder, page_size=page_size)) == []


@pytest.mark.parametrize(
    "flags",
    [
        {"kv_cache_dtype": "bf16"},
        {"disable_radix_cache": True},
        {"disable_overlap_schedule": True},
        {"disable_cuda_graph": True},
        {"chunked_prefill_size": 64},
        {"tp_size": 2},
        {"dp_size": 2},
        {"enable_priority_scheduling": True},
    ],
    ids=lambda flags: next(iter(flags)),
)
def test_server_flags_supported_are_accepted(llama_folder: str, flags: dict[str, Any]) -> None:
    assert refused_server_flags(server_args(llama_folder, **flags)) == []


def test_server_flags_cuda_with_flashinfer_is_accepted(llama_folder: str) -> None:
    args = server_args(llama_folder)
    assert refused_server_flags(Forced(args, {"device": "cuda", "attention_backend": "flashinfer"})) == []


@pytest.mark.parametrize("name", CONSTRUCTED)
def test_server_flags_constructed(llama_folder: str, name: str) -> None:
    # the field that a flag resolves to: since 0.5.22 there is another for attention DP
    resolves_to = {"enable_dp_attention": "attn_dp_size"} if "attn_dp_size" in FIELDS else {}
    refused = refused_server_flags(server_args(llama_folder, **CONSTRUCTED[name]))
    assert refused == [message_of(resolves_to.get(name, name))]


@pytest.mark.parametrize("name", FORCED)
def test_server_flags_forced(llama_folder: str, name: str) -> None:
    assert refused_server_flags(Forced(server_args(llama_folder), FORCED[name])) == [message_of(name)]


@pytest.mark.parametrize("name", ENVIRONMENT)
@pytest.mark.parametrize("value", ["1", "True", "yes"])
def test_server_flags_environment(llama_folder: str, monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    args = server_args(llama_folder)
    monkeypatch.setenv(name, value)
    assert refused_server_flags(args) == [message_of(name)]
    monkeypatch.setenv(name, "0")
    assert refused_server_flags(args) == []


def test_server_flags_reports_all_at_once(llama_folder: str) -> None:
    args = server_args(llama_folder, page_size=8, enable_mixed_chunk=True, use_ray=True)
    expected = [message_of(name) for name in ("page_size", "enable_mixed_chunk", "use_ray")]
    assert refused_server_flags(args) == expected


def test_server_table_is_covered() -> None:
    assert sorted(row.name for row in SERVER_REFUSALS) == sorted([*CONSTRUCTED, *FORCED, *ENVIRONMENT])


def test_server_table_fields_exist() -> None:
    names = {row.name for row in SERVER_REFUSALS if not row.name.isupper()}
    assert names - FIELDS <= NEWER
    assert {"decode_attention_backend", "prefill_attention_backend", "attention_backend", "device"} <= FIELDS


def test_server_table_environment_variables_exist() -> None:
    known = vars(type(envs))
    # the one variable that SGLang reads without declaring it
    assert {name for name in ENVIRONMENT if name not in known} - GONE == {"SGLANG_USE_CPU_ENGINE"}


def test_messages_name_real_flags() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    ServerArgs.add_cli_args(parser)
    known = {option for action in parser._actions for option in action.option_strings} | {"--kv-compression"}
    known |= {"--" + name.replace("_", "-") for name in NEWER}
    for row in (*SERVER_REFUSALS, *MODEL_REFUSALS):
        flags = re.findall(r"--[a-z][a-z0-9-]*", row.message)
        assert set(flags) <= known, row.name
        assert row.name.isupper() or flags, row.name


def attention(layer_id: int = 0, **options: Any) -> RadixAttention:
    shape = {"num_heads": 4, "head_dim": 16, "scaling": 0.25, "num_kv_heads": 2}
    return RadixAttention(layer_id=layer_id, **{**shape, **options})


def runner(
    folder: Path,
    config: dict[str, Any] | None = None,
    layers: list[nn.Module] | None = None,
    kv_cache_dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
) -> SimpleNamespace:
    """What `refused_model` reads of a ModelRunner, made of SGLang's own parts."""
    layers = layers if layers is not None else [attention(0), attention(1)]
    return SimpleNamespace(
        model_config=ModelConfig(model_path=save_config(folder, config or LLAMA)),
        model=nn.Sequential(*layers),
        kv_cache_dtype=kv_cache_dtype,
        device=device,
    )


def on_gpu(head_dim: int = 128, dtype: str = "bfloat16", **parts: Any) -> dict[str, Any]:
    return {
        "device": "cuda", "config": {**LLAMA, "torch_dtype": dtype}, "layers": [attention(head_dim=head_dim)], **parts,
    }  # fmt: skip


def with_sinks() -> nn.Module:
    layer = attention()
    layer.sinks = nn.Parameter(torch.zeros(4))
    return layer


QWEN3_NEXT = {**LLAMA, "architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next"}
GRANITE_HYBRID = {
    **LLAMA,
    "architectures": ["GraniteMoeHybridForCausalLM"],
    "model_type": "granitemoehybrid",
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
}
MODEL_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "reward-model": ("embedding", {"config": {**LLAMA, "architectures": ["LlamaForSequenceClassification"]}}),
    "deepseek-v2": (
        "mla",
        {
            "config": {
                **LLAMA,
                "architectures": ["DeepseekV2ForCausalLM"],
                "model_type": "deepseek_v2",
                "kv_lora_rank": 16,
                "qk_nope_head_dim": 16,
                "qk_rope_head_dim": 8,
                "v_head_dim": 16,
            }
        },
    ),
    "qwen3-next": ("mamba", {"config": QWEN3_NEXT}),
    "qwen3-next-layer-types": (
        "mamba",
        {"config": {**QWEN3_NEXT, "layer_types": ["linear_attention", "full_attention"]}},
    ),
    "granite-hybrid": ("mamba", {"config": {**GRANITE_HYBRID, "layer_types": ["mamba", "attention"]}}),
    "whisper": (
        "encoder_decoder",
        {
            "config": {
                **LLAMA,
                "architectures": ["WhisperForConditionalGeneration"],
                "model_type": "whisper",
                "d_model": 64,
                "max_target_positions": 448,
            }
        },
    ),
    "cross-attention": ("encoder_decoder", {"layers": [attention(is_cross_attention=True)]}),
    "sliding-layer": ("sliding_window", {"layers": [attention(0), attention(1, sliding_window_size=128)]}),
    "chunked-attention": ("sliding_window", {"config": {**LLAMA, "attention_chunk_size": 256}}),
    "sink-parameter": ("attention_sinks", {"layers": [with_sinks()]}),
    "logit-cap": ("logit_cap", {"layers": [attention(logit_cap=50.0)]}),
    "own-sparse-attention": (
        "sparse_attention",
        {"config": {**LLAMA, "sparse_attention_config": {"sparse_attention_freq": [0, 1]}}},
    ),
    "wide-keys": ("head_dim", {"layers": [attention(head_dim=24, v_head_dim=16)]}),
    "uneven-heads": ("uneven_layers", {"layers": [attention(0), attention(1, num_kv_heads=4)]}),
    "fp8-checkpoint": ("kv_dtype", {"kv_cache_dtype": torch.float8_e4m3fn}),
    **{f"heads-of-{size}": ("head_size", on_gpu(size)) for size in (32, 80, 96, 112, 192)},
    "fp16-model-bf16-kv": ("two_dtypes", on_gpu(dtype="float16")),
    "bf16-model-fp16-kv": ("two_dtypes", on_gpu(kv_cache_dtype=torch.float16)),
}


@pytest.mark.parametrize("case", MODEL_CASES)
def test_model_refused(tmp_path: Path, case: str) -> None:
    name, parts = MODEL_CASES[case]
    assert refused_model(runner(tmp_path, **parts)) == [message_of(name)]


def test_model_with_latent_attention_is_refused_before_it_is_loaded(tmp_path: Path, llama_folder: str) -> None:
    folder = save_config(tmp_path, MODEL_CASES["deepseek-v2"][1]["config"])
    with pytest.raises(ValueError, match=re.escape(message_of("mla"))):
        refuse_unsupported(server_args(folder))
    refuse_unsupported(server_args(llama_folder))


def test_model_gpt_oss_is_refused_for_windows_and_sinks(tmp_path: Path) -> None:
    config = {
        **LLAMA,
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    expected = [message_of("sliding_window"), message_of("attention_sinks")]
    assert refused_model(runner(tmp_path, config)) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_model_llama_is_accepted(tmp_path: Path, dtype: torch.dtype) -> None:
    assert refused_model(runner(tmp_path, kv_cache_dtype=dtype)) == []


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_model_llama_on_a_gpu_is_accepted(tmp_path: Path, head_dim: int, dtype: str) -> None:
    parts = on_gpu(head_dim, dtype, kv_cache_dtype=getattr(torch, dtype))
    assert refused_model(runner(tmp_path, **parts)) == []


def test_model_granite_without_mamba_is_accepted(tmp_path: Path) -> None:
    config = {**GRANITE_HYBRID, "layer_types": ["attention", "attention"]}
    assert refused_model(runner(tmp_path, config)) == []


def test_model_table_is_covered() -> None:
    assert {row.name for row in MODEL_REFUSALS} == {name for name, _ in MODEL_CASES.values()}


def test_the_document_is_generated() -> None:
    assert insert_generated(DOCUMENT.read_text(), "refusals", refusals_table()) == DOCUMENT.read_text()
