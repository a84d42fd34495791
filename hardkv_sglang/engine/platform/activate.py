"""Decides whether this machine needs our CPU platform; imports nothing heavy when it does not."""

from __future__ import annotations

import os


def activate() -> str | None:
    """Name of the platform class for SGLang to load, or None where an accelerator or another platform serves.

    Entry point of the group `sglang.srt.platforms`. An explicit `SGLANG_USE_CPU_ENGINE=1` (SGLang's own CPU
    kernels) is respected; `SGLANG_PLATFORM=hardkv_cpu` asks for this platform by name.
    """
    import torch

    if os.environ.get("SGLANG_PLATFORM") == "hardkv_cpu":
        return "hardkv_sglang.engine.platform.cpu.TorchCpuPlatform"
    accelerated = torch.cuda.is_available() or torch.xpu.is_available()
    if accelerated or os.environ.get("SGLANG_USE_CPU_ENGINE", "0") == "1":
        return None
    return "hardkv_sglang.engine.platform.cpu.TorchCpuPlatform"
