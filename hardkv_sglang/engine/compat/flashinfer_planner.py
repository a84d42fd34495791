"""SGLang's planner of FlashInfer's decode, which takes a page table of ours.

Read on 0.5.17 to 0.5.23: request rows come first among the arguments up to 0.5.18, not at all in 0.5.19, and by name
since 0.5.20; `kv_view` is in 0.5.19 only, `plan` since 0.5.22. None of them is read when a page table is given.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from inspect import signature
from typing import Any

import torch


def plan_decode(
    updater: Any,
    batch: Any,
    wrapper: Any,
    page_table: Any,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    seq_lens_cpu: torch.Tensor,
    fixed_split_size: int | None,
    disable_split_kv: bool,
) -> None:
    """Plan one wrapper over `page_table`, with `kv_indptr` [B + 1] and `kv_indices`; no device-to-host copy.

    updater: SGLang's `FlashInferIndicesUpdaterDecode`; seq_lens_cpu: tokens of the page table by request, on the host.
    """
    unused = {
        "req_pool_indices": req_pool_indices,
        "kv_view": None,
        "plan": getattr(batch, "kv_loc_plan", None),
    }
    asked_for = _parameters(type(updater).update_single_wrapper)
    updater.update(
        seq_lens=seq_lens,
        seq_lens_cpu=seq_lens_cpu,
        seq_lens_sum=None,
        decode_wrappers=[wrapper],
        encoder_lens=None,
        spec_info=page_table,
        fixed_split_size=fixed_split_size,
        disable_split_kv=disable_split_kv,
        **{name: value for name, value in unused.items() if name in asked_for},
    )


@cache
def _parameters(function: Callable[..., None]) -> frozenset[str]:
    return frozenset(signature(function).parameters)
