"""What select events measured of a request's tokens: one number per token and KV head, kept from event to event.

A token is measured by every select event from the time it is old enough in the recent window, so that the event that
may drop it knows how it was attended since, and not by the last `query_window` queries alone.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from hardkv_sglang.lifecycle.step_plan import SelectOp
from hardkv_sglang.memory_pool.rank_memory import RankMemory
from hardkv_sglang.selection.top_p import Importance


class RememberedEnergy:
    """Reads and writes `DeviceTables.condensed_energy` and `dense_energy`. Never synchronises."""

    def __init__(self, memory: RankMemory) -> None:
        self.memory = memory

    def update(self, op: SelectOp, layers: slice, padding: torch.Tensor, measured: Importance) -> Importance:
        """Blend what was measured now with what is remembered, remember the result, and leave out the recent window.

        padding: [B] entries before each list's first candidate; measured: of condensed tokens, right-aligned, then
        the positions up to `op.scanned_end`. Returns the importance of the candidates alone, contiguous, whose
        `mean_square` is the blend. In place in the tables. Tokens measured for the first time count as measured.
        """
        weight = self.memory.cfg.options.remembered_weight
        now = measured.mean_square
        before, known = self._recall(op, layers, padding.view(-1, 1).long(), now)
        blend = torch.where(known, weight * before + (1.0 - weight) * now, now)
        self._store(op, layers, padding.view(-1, 1).long(), blend)
        N = op.num_candidates
        return replace(
            measured,
            distributions=measured.distributions[..., :N].contiguous(),
            mean=measured.mean[:, :N].contiguous(),
            mean_square=blend[:, :N].contiguous(),
        )

    def _positions(self, op: SelectOp, device: torch.device) -> torch.Tensor:
        return torch.arange(op.condensed_end, op.scanned_end, device=device)

    def _recall(
        self, op: SelectOp, layers: slice, padding: torch.Tensor, like: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Remembered energy of every entry, and whether there is any; both [B, N]."""
        tables, bound, device = self.memory.tables, op.condensed_list_bound, like.device
        index = torch.arange(bound, device=device)[None, :] - padding
        condensed = tables.condensed_energy[layers, op.row].flatten(0, 1).gather(1, index.clamp(min=0))
        positions = self._positions(op, device)
        dense = tables.dense_energy[layers, op.row].flatten(0, 1)[:, positions % self.memory.cfg.remembered_span]
        is_known = (positions < op.remembered_end).expand(len(padding), -1)
        return torch.cat((condensed, dense), 1).to(like.dtype), torch.cat((index >= 0, is_known), 1)

    def _store(self, op: SelectOp, layers: slice, padding: torch.Tensor, energy: torch.Tensor) -> None:
        tables, bound, device = self.memory.tables, op.condensed_list_bound, energy.device
        energy = energy.to(tables.dense_energy.dtype)
        shape = tables.num_sparse[layers, op.row].shape
        if bound:
            # as in the table: from the left; what stands behind a list's end is never read
            index = (torch.arange(bound, device=device)[None, :] + padding).clamp(max=bound - 1)
            tables.condensed_energy[layers, op.row, :, :bound] = energy[:, :bound].gather(1, index).view(*shape, bound)
        positions = self._positions(op, device) % self.memory.cfg.remembered_span
        tables.dense_energy[layers, op.row].index_copy_(2, positions, energy[:, bound:].view(*shape, -1))
