"""Command line and `Engine` options, and how they travel to the scheduler processes."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from hardkv_sglang.config import HardKVConfig
from hardkv_sglang.engine import compat
from hardkv_sglang.engine.refusals.models import refused_architecture
from hardkv_sglang.engine.refusals.options import refused_options
from hardkv_sglang.engine.refusals.server_flags import refused_server_flags
from hardkv_sglang.selection.priors import Priors

MODES = ("none", "hardkv")
ATTRIBUTE = "_hardkv"  # an underscore attribute of ServerArgs survives pickling and its read-only guard

# flags whose stock default HARD-KV cannot use, and the value it starts with instead
DEFAULTS = {"page_size": 32, "max_running_requests": 256}
CUDA_DEFAULTS = {"attention_backend": "flashinfer"}
MAX_GRAPH_BATCH = 512  # graphs for larger batches are left to the user: each takes memory from the pool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add our flags to SGLang's parser."""
    group = parser.add_argument_group("HARD-KV")
    group.add_argument(
        "--kv-compression",
        choices=MODES,
        default="none",
        help="Compress the KV cache of generated tokens while requests run (hardkv), or serve dense (none).",
    )
    group.add_argument(
        "--kv-compression-config",
        type=_parse_config,
        default=None,
        metavar="JSON|FILE",
        help="HARD-KV options as a JSON object or the path of a JSON file; names and ranges: "
        "`python -m hardkv_sglang.config`, or docs/options.md.",
    )


def _parse_config(text: str) -> HardKVConfig:
    try:
        return HardKVConfig.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def resolve_options(mode: str, source: str | Mapping[str, Any] | HardKVConfig | None) -> HardKVConfig | None:
    """Options of an enabled mode; None when compression is off. Raises `ValueError` on bad input."""
    if mode not in MODES:
        raise ValueError(f"kv_compression={mode!r} is not one of: {', '.join(MODES)}")
    if mode == "none":
        if source is not None:
            raise ValueError("--kv-compression-config has no effect without --kv-compression hardkv")
        return None
    options = source if isinstance(source, HardKVConfig) else HardKVConfig.parse(source)
    if options.priors is not None:
        Priors.read(options.priors)  # whether it fits the model shows when the model is loaded
    return options


def seed_defaults(given: dict[str, Any], device_is_cuda: bool) -> None:
    """Fill flags that the user left open, in place, where stock defaults do not suit compression."""
    defaults = {**DEFAULTS, **(CUDA_DEFAULTS if device_is_cuda else {})}
    for name, value in defaults.items():
        if given.get(name) is None:
            given[name] = value
    if device_is_cuda and given.get("cuda_graph_max_bs_decode") is None:
        # stock captures as many requests as the GPU can hold dense; compression makes more of them fit
        given["cuda_graph_max_bs_decode"] = min(given["max_running_requests"], MAX_GRAPH_BATCH)


def attach_options(server_args: Any, options: HardKVConfig | None) -> Any:
    """Store the options on a ServerArgs object, as plain data; returns the object."""
    if options is not None:
        setattr(server_args, ATTRIBUTE, options.to_dict())
    return server_args


def attached_options(server_args: Any) -> HardKVConfig | None:
    """The options that `attach_options` stored; None when compression is off."""
    stored = getattr(server_args, ATTRIBUTE, None)
    return None if stored is None else HardKVConfig.from_mapping(stored)


def refuse_unsupported(server_args: Any) -> None:
    """Raise `ValueError` listing every server flag, option and kind of model that compression cannot work with."""
    flags, model_config = compat.resolved_flags(server_args), compat.model_config_of(server_args)
    options = attached_options(server_args)
    problems = [*refused_server_flags(flags), *refused_architecture(model_config)]
    problems += refused_options(options, flags) if options is not None else []
    if problems:
        raise ValueError("--kv-compression hardkv refuses to start:\n  " + "\n  ".join(problems))
