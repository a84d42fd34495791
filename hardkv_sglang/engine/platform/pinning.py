"""Host memory that SGLang asks to be pinned, on a machine that has no device to pin it for.

PyTorch raises there; memory that is not pinned serves as well, since no copy to a device follows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

import torch

# modules of SGLang that pin whatever the device is, and that a CPU server runs
PINNING_MODULES = (
    "sglang.srt.constrained.xgrammar_backend",
    "sglang.srt.lora.backend.torch_backend",
    "sglang.srt.lora.layers",
)
FACTORIES = ("empty", "full", "tensor", "zeros")


class UnpinnedTorch(ModuleType):
    """Stands in for `torch` in a module: the same names, but `pin_memory=True` has no effect."""

    def __init__(self) -> None:
        super().__init__(torch.__name__)
        for name in FACTORIES:
            setattr(self, name, _unpinned(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def install() -> None:
    """Let these modules and `Tensor.pin_memory` take ordinary memory."""
    stand_in = UnpinnedTorch()
    for name in PINNING_MODULES:
        import_module(name).__dict__["torch"] = stand_in
    torch.Tensor.pin_memory = _as_it_is  # type: ignore[assignment, method-assign]


def _as_it_is(self: torch.Tensor, device: torch.device | str | None = None) -> torch.Tensor:
    """See `torch.Tensor.pin_memory`."""
    return self


def _unpinned(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def create(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        return factory(*args, **kwargs)

    return create
