"""The installed SGLang's decode planner takes the arguments that we give it; what it does with them needs a GPU."""

from __future__ import annotations

from inspect import BoundArguments, signature
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.layers.attention.flashinfer_backend import FlashInferIndicesUpdaterDecode

from hardkv_sglang.engine import compat


def test_the_planner_takes_our_arguments() -> None:
    calls: list[BoundArguments] = []

    class Updater:
        update_single_wrapper = FlashInferIndicesUpdaterDecode.update_single_wrapper

        def update(self, *args: Any, **kwargs: Any) -> None:
            calls.append(signature(FlashInferIndicesUpdaterDecode.update_single_wrapper).bind(self, *args, **kwargs))

    rows, lens, table, wrapper = torch.tensor([3]), torch.tensor([70]), object(), object()
    compat.plan_decode(
        Updater(), SimpleNamespace(), wrapper, table, req_pool_indices=rows, seq_lens=lens, seq_lens_cpu=lens,
        fixed_split_size=None, disable_split_kv=False,
    )  # fmt: skip
    (call,) = calls
    given = call.arguments
    assert given["spec_info"] is table and given["decode_wrappers"] == [wrapper]
    assert given["seq_lens"] is lens and given["seq_lens_cpu"] is lens
    assert given.get("req_pool_indices", rows) is rows
    # the device is not asked for the sum
    assert given["seq_lens_sum"] is None
