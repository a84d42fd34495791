"""Stock SGLang on a plain CPU: torch attention, paged allocation, radix cache, overlap scheduler.

Uses SGLang's out-of-tree platform interface and none of its CPU kernels, which no wheel ships. Meant for
development, tests and the demo; every tensor operation is a torch reference.
"""

from __future__ import annotations

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform


class TorchCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """CPU platform for machines without an accelerator."""

    _enum = PlatformEnum.OOT

    def get_device(self, device_id: int = 0) -> str:
        """The device string that `--device` defaults to; the mixin's torch.device breaks argument resolution."""
        return "cpu"

    def init_backend(self) -> None:
        """Once in each worker: see `platform/linear.py`."""
        from hardkv_sglang.engine.platform import linear

        linear.install()

    def get_default_attention_backend(self) -> str:
        """The only attention backend that is pure torch."""
        return "torch_native"

    def get_mha_kv_pool_cls(self) -> type:
        """The head-paged pool: the same memory as stock, allocated as one storage."""
        # late: this module is loaded while sglang itself is still being imported
        from hardkv_sglang.memory_pool.pool import HeadPagedTokenToKVPool

        return HeadPagedTokenToKVPool

    def get_paged_allocator_cls(self) -> type:
        """Paged allocation without Triton."""
        from hardkv_sglang.engine.platform.allocator import TorchPagedAllocator

        return TorchPagedAllocator

    def is_pin_memory_available(self, device: torch.device | None = None) -> bool:
        """There is no device to pin host memory for."""
        return False
