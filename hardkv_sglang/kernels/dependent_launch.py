"""Programmatic dependent launch: a kernel is set up while the one before it still runs, and waits inside for its end.

Between two small kernels of a captured step that saves about what starting a kernel costs. NVIDIA GPUs since Hopper.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

FIRST_CAPABILITY = 9


@triton.jit
def wait_for_previous():
    """Let the next kernel be set up, and wait until what earlier kernels wrote can be read."""
    gdc_launch_dependents()
    gdc_wait()


@cache
def launch_options(device: torch.device) -> dict[str, Any]:
    """Arguments of a launch: constant `PDL` of a kernel that calls `wait_for_previous` first, and Triton's option."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] < FIRST_CAPABILITY:
        return {"PDL": False}
    return {"PDL": True, "launch_pdl": True}
