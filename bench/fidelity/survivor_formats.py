"""Number formats of condensed rows, as rounded values in pages of 16 bits: candidates, and what others do.

A row is rounded once, in the condense event that first copies it; later events copy it as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bench.fidelity.model import ModelShape
from bench.fidelity.pool import ROW
from bench.fidelity.session import CompressedSession
from hardkv_sglang.config import HardKVConfig
from hardkv_sglang.kernels.packed_rows import key_statistics, rotation
from hardkv_sglang.kernels.reference_condense import sparse_source
from hardkv_sglang.lifecycle.step_plan import CondenseOp, StepPlan

GROUP = 32  # tokens that share scale and zero of a channel in KIVI's format

Statistics = tuple[torch.Tensor, torch.Tensor]
"""Mean and standard deviation of each channel of every list, [L * H, D]."""


def round_over(x: torch.Tensor, axis: int, bits: int) -> torch.Tensor:
    """The nearest of 2^bits even steps from the least to the largest value along an axis; float16 scale and zero."""
    low, high = x.amin(axis, keepdim=True), x.amax(axis, keepdim=True)
    low = low.half().float()
    scale = ((high - low) / (2**bits - 1)).half().float().clamp(min=6e-8)
    return ((x - low) / scale).round().clamp(0, 2**bits - 1) * scale + low


@dataclass(frozen=True)
class RowFormat:
    """How keys or values of a list are rounded."""

    bits: int = 16
    by_channel: bool = False  # over groups of `GROUP` tokens, instead of by token
    rotated: bool = False
    centred: bool = False  # less the list's mean of each channel
    power: float = 0.0  # divided by the list's standard deviation of each channel to this power
    as_stored: bool = False  # mean and deviation to the power 0.5 are offset and scale as a server takes them
    reference: str = "aged"  # tokens whose mean and deviation are taken at the first event: aged, prompt, all

    def round(self, rows: torch.Tensor, mean: torch.Tensor, deviation: torch.Tensor) -> torch.Tensor:
        """Rows [N, D] of one list as the format holds them; mean, deviation: [D]."""
        if self.bits == 16 or not len(rows):
            return rows
        if self.by_channel:
            return torch.cat([round_over(group, 0, self.bits) for group in rows.split(GROUP)])
        offset = mean if self.centred else torch.zeros_like(mean)
        scale = deviation.clamp(min=1e-4).pow(self.power)
        x = (rows - offset) / scale
        if not self.rotated:
            return round_over(x, 1, self.bits) * scale + offset
        turn = rotation(rows.shape[1], rows.dtype)
        return round_over(x @ turn, 1, self.bits) @ turn.T * scale + offset


@dataclass(frozen=True)
class SurvivorFormat:
    """Of keys and of values."""

    name: str
    keys: RowFormat
    values: RowFormat


class RoundingSession(CompressedSession):
    """A session whose condense events round what they copy for the first time."""

    statistics: tuple[Statistics, Statistics]  # of keys and values, from the first condense event on

    def __init__(self, form: SurvivorFormat, shape: ModelShape, options: HardKVConfig, max_len: int) -> None:
        super().__init__(shape, options, max_len)
        self.form = form

    def _run(self, plan: StepPlan) -> None:
        for op in plan.condenses:
            self._round(op)
        super()._run(plan)

    def _round(self, op: CondenseOp) -> None:
        """Round the sparse tokens where they lie: the event copies them from there, and frees their pages."""
        pool, form = self.pool, self.form
        storages = (pool.k_storage, form.keys), (pool.v_storage, form.values)
        if op.is_first:
            keys, values = (self._statistics(storage, row_format) for storage, row_format in storages)
            self.statistics = keys, values
        source = sparse_source(self.cfg.layout, self.tables, pool.req_to_token, ROW)
        lists = source.split(self.tables.num_sparse[:, ROW].flatten().tolist())
        for (storage, row_format), (mean, deviation) in zip(storages, self.statistics, strict=True):
            rows = storage.view(-1, storage.shape[-1])
            for i, index in enumerate(lists):
                rows[index] = row_format.round(rows[index], mean[i], deviation[i])

    def _statistics(self, storage: torch.Tensor, form: RowFormat) -> Statistics:
        first = self.state.prefix_end if form.reference == "aged" else 0
        last = self.state.prefix_end if form.reference == "prompt" else self.state.recent_start
        rows = storage[:, self.pool.req_to_token[ROW, first:last].long()]  # [L, N, H, D]
        if form.as_stored:
            offset, scale = key_statistics(rows.transpose(1, 2).flatten(0, 1))
            return offset, scale.square()
        return rows.mean(1).flatten(0, 1), rows.std(1).flatten(0, 1)
