"""Decides whether this machine needs our CPU platform; imports nothing heavy when it does not."""

from __future__ import annotations

import logging
import os
from importlib.metadata import entry_points
from importlib.util import find_spec

import torch
from sglang.srt.environ import envs

NAME = "hardkv_cpu"  # our entry point
GROUP = "sglang.srt.platforms"
PLATFORM = "hardkv_sglang.engine.platform.cpu.TorchCpuPlatform"
# packages that SGLang takes as a sign of an accelerator, whether or not PyTorch has loaded them
ACCELERATOR_PACKAGES = ("torch_npu", "habana_frameworks", "torchada", "torch_musa")

logger = logging.getLogger(__name__)


def activate() -> str | None:
    """Name of the platform class for SGLang to load, or None where anything else serves.

    Entry point of the group `sglang.srt.platforms`. `SGLANG_PLATFORM=hardkv_cpu` asks for this platform by name.
    Otherwise it stands aside for every accelerator, for SGLang's own CPU kernels (`SGLANG_USE_CPU_ENGINE=1`) and for
    every other platform plugin: SGLang refuses to start with two active ones.
    """
    if envs.SGLANG_PLATFORM.get() == NAME:
        return PLATFORM
    if _has_accelerator() or os.environ.get("SGLANG_USE_CPU_ENGINE", "0") == "1":
        return None
    others = _other_plugins()
    if others:
        logger.info(
            "%s stands aside for the platform plugins %s; SGLANG_PLATFORM=%s selects it", NAME, ", ".join(others), NAME
        )
        return None
    return PLATFORM


def _has_accelerator() -> bool:
    # torch.accelerator knows one kind for each build of PyTorch; an extension may add another without it
    kinds = (getattr(torch, name, None) for name in ("cuda", "xpu", "mps", "npu", "hpu", "musa"))
    return (
        torch.accelerator.is_available()
        or any(kind is not None and kind.is_available() for kind in kinds)
        or any(find_spec(package) is not None for package in ACCELERATOR_PACKAGES)
    )


def _other_plugins() -> list[str]:
    """Platform plugins that SGLang is going to ask beside this one."""
    allowed = {name.strip() for name in (envs.SGLANG_PLUGINS.get() or "").split(",")} - {""}
    names = {entry.name for entry in entry_points(group=GROUP)} - {NAME}
    return sorted(names & allowed if allowed else names)
