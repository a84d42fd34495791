"""A server's flags and its model, resolved by SGLang itself and checked as at a start; nothing is loaded."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from hardkv_sglang.config import HardKVConfig
from hardkv_sglang.engine import compat
from hardkv_sglang.engine.arguments import attached_options
from hardkv_sglang.engine.preflight import OK, REFUSED, WARN, Finding
from hardkv_sglang.engine.preflight.memory import inspect_memory
from hardkv_sglang.engine.refusals.models import KERNEL_HEAD_SIZES, refused_model
from hardkv_sglang.engine.refusals.options import refused_options
from hardkv_sglang.engine.refusals.server_flags import refused_server_flags
from hardkv_sglang.selection.priors import PriorsError, check_options, load_priors

# what SGLang's resolution of flags and its reading of a config.json of any content raise
SGLANG_ERRORS = (
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)

KV_DTYPES = {"bf16": torch.bfloat16, "bfloat16": torch.bfloat16, "fp16": torch.float16, "float16": torch.float16}


@dataclass(frozen=True)
class ModelOnPaper:
    """Stands for SGLang's `ModelRunner` before a model is loaded: what config.json tells, and no layers yet."""

    model_config: Any
    kv_cache_dtype: torch.dtype
    device: str
    model: torch.nn.Module


def inspect_launch(flags: Sequence[str]) -> list[Finding]:
    """Findings about a start of `sglang.launch_server` with these flags; the first that stops it ends the list."""
    server_args = resolve(flags)
    if isinstance(server_args, Finding):
        return [server_args]
    options = attached_options(server_args)
    if options is None:
        return [Finding(WARN, "flags", "--kv-compression none serves dense", "use --kv-compression hardkv")]
    try:
        config = compat.model_config_of(server_args)
    except SGLANG_ERRORS as error:
        text = f"{server_args.model_path} cannot be read: {error}"
        return [*inspect_flags(server_args), Finding(REFUSED, "model", text, "check --model-path")]
    in_effect = compat.resolved_flags(server_args)
    model_findings = inspect_model(config, in_effect)
    is_sound = all(finding.status == OK for finding in model_findings)
    # the check of all flags refuses some models, too: they are named once, as models
    findings = inspect_flags(server_args) if is_sound else refused_flags(server_args)
    findings += [*model_findings, *inspect_priors(options, config)]
    if is_sound:
        findings += inspect_memory(options, config, in_effect, kv_dtype_of(config, in_effect))
    return findings


def resolve(flags: Sequence[str]) -> Any:
    """SGLang's arguments from flags, with compression on unless the flags say otherwise; or what refuses them."""
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args

    load_plugins()
    given = any(flag.split("=")[0] == "--kv-compression" for flag in flags)
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            server_args = prepare_server_args([*flags, *([] if given else ["--kv-compression", "hardkv"])])
            compat.resolve(server_args)
            return server_args
    except SystemExit:
        # argparse prints its usage, some hundred lines, and then what is wrong
        said = errors.getvalue().strip().rpartition("error: ")[2]
        return Finding(REFUSED, "flags", said, "see python -m sglang.launch_server --help")
    except SGLANG_ERRORS as error:
        return Finding(REFUSED, "flags", str(error), "change that flag, or check --model-path")


def refused_flags(server_args: Any) -> list[Finding]:
    """Our refusals of flags, environment variables and options."""
    in_effect, options = compat.resolved_flags(server_args), attached_options(server_args)
    messages = refused_server_flags(in_effect)
    messages += refused_options(options, in_effect) if options is not None else []
    return [Finding.refused("flags", message) for message in messages]


def inspect_flags(server_args: Any) -> list[Finding]:
    """Our refusals of flags and environment variables, then SGLang's own."""
    refused = refused_flags(server_args)
    if refused:
        return refused
    try:
        server_args.check_server_args()
    except SGLANG_ERRORS as error:
        return [Finding(REFUSED, "flags", str(error), "change that flag")]
    in_effect = compat.resolved_flags(server_args)
    backend = in_effect.decode_attention_backend or in_effect.attention_backend
    text = f"--device {in_effect.device} --attention-backend {backend} --page-size {in_effect.page_size}"
    return [Finding(OK, "flags", text)]


def inspect_model(config: Any, server_args: Any) -> list[Finding]:
    """Our refusals of models, as far as config.json tells; layers are looked at when the model is loaded."""
    kind = config.hf_config.architectures[0]
    paper = ModelOnPaper(config, kv_dtype_of(config, server_args), server_args.device, torch.nn.Module())
    refused = [*refused_model(paper), *refused_on_paper(config)]
    if server_args.device == "cuda" and config.head_dim not in KERNEL_HEAD_SIZES:
        refused.append(f"heads of {config.head_dim} elements are not among the kernels' sizes; remove --kv-compression")
    if refused:
        return [Finding.refused("model", f"{kind}: {message}") for message in refused]
    heads, total = config.get_num_kv_heads(server_args.tp_size), config.get_total_num_kv_heads()
    return [
        Finding(
            OK, "model",
            f"{kind}, {config.num_attention_layers} layers, {total} KV heads of {config.head_dim} ({heads} per rank), "
            f"context {config.context_len} tokens, {str(config.dtype).removeprefix('torch.')}",
        )
    ]  # fmt: skip


def refused_on_paper(config: Any) -> list[str]:
    """What is refused for the sake of single layers, which are not there yet, read from config.json instead."""
    kinds = set(getattr(config.hf_text_config, "layer_types", None) or ())
    signs = {
        "K and V heads of different sizes": config.head_dim != config.v_head_dim,
        "sliding-window or chunked attention layers": bool(kinds & {"sliding_attention", "chunked_attention"}),
        "capped attention logits": bool(getattr(config.hf_text_config, "attn_logit_softcapping", None)),
    }
    return [f"config.json names {sign}; remove --kv-compression" for sign, is_there in signs.items() if is_there]


def kv_dtype_of(config: Any, server_args: Any) -> torch.dtype:
    """Type of the pool, as flags and checkpoint ask for it."""
    if server_args.kv_cache_dtype != "auto":
        # others are refused as a flag
        return KV_DTYPES.get(server_args.kv_cache_dtype, config.dtype)
    asked = getattr(config.hf_config, "quantization_config", None) or {}
    dtype: torch.dtype = torch.uint8 if asked.get("kv_cache_quant_algo") else config.dtype
    return dtype


def inspect_priors(options: HardKVConfig, config: Any) -> list[Finding]:
    """Whether the priors file fits options and model."""
    if options.priors is None:
        return []
    try:
        load_priors(
            options.priors,
            model_name=config.model_path,
            num_layers=config.num_attention_layers,
            num_kv_heads_global=config.get_total_num_kv_heads(),
        )
    except (PriorsError, OSError) as error:
        return [Finding(REFUSED, "priors", str(error), "write it anew with hardkv calibrate, or leave priors out")]
    different = check_options(options.priors, options.to_dict())
    return [Finding(WARN, "priors", text, "calibrate with the options that you serve with") for text in different] or [
        Finding(OK, "priors", options.priors)
    ]
