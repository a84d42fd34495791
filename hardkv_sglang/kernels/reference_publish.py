"""Publication of a select event in torch: the specification of `publish.py`, and what runs without a GPU."""

from __future__ import annotations

import torch

from hardkv_sglang.lifecycle.step_plan import SelectOp
from hardkv_sglang.memory_pool.tables import DeviceTables


def publish(tables: DeviceTables, op: SelectOp, keep: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """Write the request's tiers: survivors, sparse lists, temperatures, ends of the dense tiers; stop observing.

    keep: [L * H, N] bool, candidates in the order of `CandidateReader`: condensed tokens, right-aligned, then the
    positions from `op.condensed_end` on; temperature: [L * H] float32.
    Returns the kept tokens of each list, [L, H] int32. No sync; in place in `tables`, whose `condensed_pages` and
    `num_condensed` stay: the lists shrink when the request condenses.
    """
    bound = op.condensed_list_bound
    shape = tables.num_sparse[:, op.row].shape
    if bound:
        padding = bound - tables.num_condensed[:, op.row].long().view(-1, 1)
        index = torch.arange(bound, device=keep.device)[None, :] + padding
        survives = keep[:, :bound].gather(1, index.clamp(max=bound - 1)) & (index < bound)
        tables.condensed_keep[:, op.row, :, :bound] = survives.view(*shape, bound)
    in_span = keep[:, bound:]
    span = in_span.shape[1]
    target = torch.where(in_span, in_span.cumsum(1) - 1, span)
    positions = torch.arange(op.condensed_end, op.recent_start, dtype=torch.int32, device=keep.device)
    lists = torch.zeros((keep.shape[0], span + 1), dtype=torch.int32, device=keep.device)
    lists.scatter_(1, target, positions.expand_as(target))
    tables.sparse_positions[:, op.row, :, :span] = lists[:, :span].view(*shape, span)
    tables.num_sparse[:, op.row] = in_span.sum(1, dtype=torch.int32).view(shape)
    tables.temperature[:, op.row] = temperature.float().view(shape)
    tables.prefix_end[op.row] = op.prefix_end
    tables.recent_start[op.row] = op.recent_start
    tables.ring_slot[op.row] = -1
    return keep.sum(1, dtype=torch.int32).view(shape)
