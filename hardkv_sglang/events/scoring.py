"""Scores of a select event: in torch, or in the pool by kernels that keep no logits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch

from hardkv_sglang.events.candidates import CandidateReader
from hardkv_sglang.events.remembered import RememberedEnergy
from hardkv_sglang.lifecycle.step_plan import SelectOp
from hardkv_sglang.selection.importance import measure_importance
from hardkv_sglang.selection.top_p import Lists, Scored

MAX_ELEMENTS_PER_CHUNK = 1 << 26  # of the largest tensor while scoring: layers are scored together up to that size


@dataclass(frozen=True)
class Scorer(ABC):
    """Scores every list of a request, some layers at a time."""

    reader: CandidateReader

    @abstractmethod
    def score_layers(self, op: SelectOp, layers: slice) -> Scored:
        """Score the lists of some layers."""

    @abstractmethod
    def elements_per_token(self) -> int:
        """Size of a layer's largest temporary tensor per candidate position."""

    def score(self, op: SelectOp) -> Scored:
        """Score all lists, in the order of the tables: layer, then KV head. No sync."""
        num_layers = self.reader.memory.layout.num_layers
        num_tokens = op.condensed_list_bound + op.scanned_end - op.condensed_end
        step = max(1, MAX_ELEMENTS_PER_CHUNK // max(1, num_tokens * self.elements_per_token()))
        chunks = [slice(first, min(first + step, num_layers)) for first in range(0, num_layers, step)]
        scored = Scored.join([self.score_layers(op, layers) for layers in chunks])
        return replace(scored, num_aged=op.recent_start - op.prefix_end)


class TorchScorer(Scorer):
    """The definition: attention logits of all observation queries in memory."""

    def elements_per_token(self) -> int:
        """Logits."""
        return self.reader.memory.cfg.num_q_heads * self.reader.memory.cfg.options.query_window

    def score_layers(self, op: SelectOp, layers: slice) -> Scored:
        """See `Scorer.score_layers`."""
        reader = self.reader
        found = reader.candidates(op, layers)
        importance = measure_importance(found, *reader.policy.reductions)
        if not reader.memory.cfg.remembers:
            return reader.policy.rate(importance, found)
        importance = RememberedEnergy(reader.memory).update(op, layers, reader.padding(op, layers), importance)
        N = op.num_candidates
        values = None if found.values is None else found.values[:, :N]
        return reader.policy.rate(importance, Lists(valid=found.valid[:, :N].contiguous(), values=values))


class PooledScorer(Scorer):
    """The same for policies that reduce attention by its mean, on a GPU; equal up to rounding."""

    def elements_per_token(self) -> int:
        """Keys, where the policy reads them or they are restored, or storage rows."""
        layout, policy = self.reader.memory.layout, self.reader.policy
        has_rows = policy.needs_keys or layout.survivors.is_packed
        return layout.num_kv_heads * (layout.head_dim if has_rows else 1)

    def score_layers(self, op: SelectOp, layers: slice) -> Scored:
        """See `Scorer.score_layers`."""
        from hardkv_sglang.kernels.importance import PooledLists, measure_pooled
        from hardkv_sglang.kernels.list_candidates import list_candidates
        from hardkv_sglang.kernels.restore import restore_candidates

        reader, memory = self.reader, self.reader.memory
        found = list_candidates(memory, op, layers)
        k_rows, v_rows, rows = memory.k_rows, memory.v_rows, found.rows
        if memory.layout.survivors.is_packed:
            k_rows, v_rows = restore_candidates(memory, op, layers, found)
            rows = torch.arange(rows.numel(), device=rows.device).view_as(rows)
        lists = PooledLists(
            valid=found.valid,
            keys=k_rows[rows] if reader.policy.needs_keys else None,
            k_rows=k_rows,
            v_rows=v_rows,
            rows=rows,
            padding=found.padding,
        )
        queries, lse2 = (x.flatten(1, 2) for x in reader.queries(op, layers))
        importance = measure_pooled(lists, found.attended, queries, lse2, reader.scale2)
        if memory.cfg.remembers:
            importance = RememberedEnergy(memory).update(op, layers, found.padding, importance)
            lists = lists.head(op.num_candidates)
        return reader.policy.rate(importance, lists)


def make_scorer(reader: CandidateReader) -> Scorer:
    """The fastest scorer for the policy and the device of the pool."""
    in_pool = reader.memory.is_on_gpu and reader.policy.reductions == ("mean", "mean")
    return PooledScorer(reader) if in_pool else TorchScorer(reader)
