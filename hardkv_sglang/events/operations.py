"""The device operations of events that exist twice: as Triton kernels, and in torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from hardkv_sglang.kernels import reference_condense, reference_publish
from hardkv_sglang.lifecycle.step_plan import CondenseOp, SelectOp
from hardkv_sglang.memory_pool.rank_memory import RankMemory
from hardkv_sglang.memory_pool.tables import DeviceTables
from hardkv_sglang.selection.top_p import BoundCounts, bound_counts


@dataclass(frozen=True)
class Operations:
    """Both sets choose and write the same bits."""

    bound_counts: BoundCounts
    """Floor, cap and page filling of the kept sets."""
    publish: Callable[[DeviceTables, SelectOp, torch.Tensor, torch.Tensor], torch.Tensor]
    """See `reference_publish.publish`."""
    condense: Callable[[RankMemory, list[CondenseOp]], None]
    """Move the survivors of each op's row to its new token pages."""


def operations_for(memory: RankMemory) -> Operations:
    """Kernels where the pool is on a GPU, else torch."""
    if not memory.is_on_gpu:
        return Operations(bound_counts, reference_publish.publish, _condense_in_torch)
    from hardkv_sglang.kernels.bound import bound_counts as bound_on_gpu
    from hardkv_sglang.kernels.publish import publish as publish_on_gpu

    return Operations(bound_on_gpu, publish_on_gpu, _condense_on_gpu)


def _condense_in_torch(memory: RankMemory, ops: list[CondenseOp]) -> None:
    m = memory
    for op in ops:
        reference_condense.condense(
            m.k_storage, m.v_storage, m.layout, m.tables, m.req_to_token, op.row, _pages(memory, op), op.is_first
        )


def _condense_on_gpu(memory: RankMemory, ops: list[CondenseOp]) -> None:
    from hardkv_sglang.kernels.condense import condense
    from hardkv_sglang.kernels.restore import take_statistics

    m = memory
    if m.layout.survivors.is_packed:
        for op in ops:
            if op.is_first:
                take_statistics(memory, op.row)
    on_host = torch.tensor([op.row for op in ops], device="cpu", pin_memory=True)
    new_pages = torch.nn.utils.rnn.pad_sequence([_pages(memory, op) for op in ops], batch_first=True)
    on_device = on_host.to(m.req_to_token.device, non_blocking=True)
    condense(m.k_storage, m.v_storage, m.layout, m.tables, m.req_to_token, on_device, new_pages)


def _pages(memory: RankMemory, op: CondenseOp) -> torch.Tensor:
    """Token pages [P] that the op copies into."""
    page_size = memory.layout.page_size
    pages: torch.Tensor = op.slots[::page_size] // page_size
    return pages
