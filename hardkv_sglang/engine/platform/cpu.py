"""Stock SGLang on a plain CPU: torch attention, paged allocation, radix cache, overlap scheduler, grammars, LoRA.

Uses SGLang's out-of-tree platform interface and none of its CPU kernels, which no wheel ships. Meant for
development, tests and the demo; every tensor operation is a torch reference.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform

# SGLang and this package's other modules are imported late: this one is loaded while sglang is still being imported


class TorchCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """CPU platform for machines without an accelerator."""

    _enum = PlatformEnum.OOT

    def get_device(self, device_id: int = 0) -> str:
        """The device string that `--device` defaults to; the mixin's torch.device breaks argument resolution."""
        return "cpu"

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """LoRA by torch instead of Triton, which needs an accelerator.

        Raises `ValueError` for `--enable-torch-compile`: stock's compiled decode does not know torch attention.
        """
        if server_args.enable_torch_compile:
            raise ValueError(
                "--enable-torch-compile: the attention of this CPU platform cannot be compiled; "
                "remove --enable-torch-compile"
            )
        if server_args.lora_backend == "csgmv":
            server_args.lora_backend = "torch_native"

    def init_backend(self) -> None:
        """Once in each worker: what SGLang lacks on a CPU, see the modules."""
        from hardkv_sglang.engine.platform import grammar, linear, pinning

        linear.install()
        pinning.install()
        grammar.install()

    def get_default_attention_backend(self) -> str:
        """The only attention backend that is pure torch."""
        return "torch_native"

    def get_mha_kv_pool_cls(self) -> type:
        """The head-paged pool: the same memory as stock, allocated as one storage."""
        from hardkv_sglang.memory_pool.pool import HeadPagedTokenToKVPool

        return HeadPagedTokenToKVPool

    def get_kv_pool_cls(self, *, kind: str) -> type | None:
        """Since 0.5.22 in the place of the three methods around it; SGLang's own latent pools serve there."""
        return self.get_mha_kv_pool_cls() if kind == "mha" else None

    def get_mla_kv_pool_cls(self) -> type:
        """Stock's pool of latent KV; with `--kv-compression` such a model is refused once its pool exists."""
        from hardkv_sglang.engine.platform.mla_pool import LatentKVPool

        return LatentKVPool

    def get_dsa_kv_pool_cls(self) -> type:
        """Stock's pool of latent KV with an index for sparse attention."""
        from sglang.srt.mem_cache.memory_pool import DSATokenToKVPool

        return DSATokenToKVPool

    def get_paged_allocator_cls(self) -> type | None:
        """Paged allocation without Triton; None where SGLang's own does without."""
        from hardkv_sglang.engine import compat

        if compat.allocates_pages_in_torch():
            return None
        from hardkv_sglang.engine.platform.allocator import TorchPagedAllocator

        return TorchPagedAllocator

    def is_pin_memory_available(self, device: torch.device | None = None) -> bool:
        """There is no device to pin host memory for."""
        return False

    def get_torch_profiler_activity_str(self) -> str:
        """Name of this platform's activity in `/start_profile`.

        Not "CPU", which SGLang profiles by itself: of two profilers in one process the second stops the first.
        """
        return "TORCH_CPU"

    def get_torch_profiler_activity(self) -> torch.profiler.ProfilerActivity:
        """The only activity there is."""
        return torch.profiler.ProfilerActivity.CPU
