"""TriAttention (arXiv 2604.04921): keys rated by where the queries of a head point on average, not by what they saw.

Before RoPE the queries of a head lie close around a centre. Turned to a later position, the centre is the query that is
expected there; how far queries spread around it weighs the length of a key, whatever its direction. Centres are
calibrated offline there. Here they are those of the very text that is measured: no calibration can be better.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bench.fidelity.attention import DenseCache
from bench.fidelity.model import BlockModel
from bench.fidelity.scores import Reference
from hardkv_sglang.events.scoring import TorchScorer
from hardkv_sglang.lifecycle.step_plan import SelectOp
from hardkv_sglang.selection.top_p import Scored

OFFSETS = 17  # later positions that are averaged over: 1, 2, 4 to 65536 tokens ahead, as published


def complex_pairs(rows: torch.Tensor) -> torch.Tensor:
    """Rows [..., D] as complex numbers [..., D / 2], one per RoPE frequency (pairs D / 2 apart, as Llama and Qwen2)."""
    real, imaginary = rows.float().chunk(2, -1)
    return torch.complex(real, imaginary)


@dataclass(frozen=True)
class QueryStatistics:
    """Queries before RoPE, per layer, query head and frequency."""

    centre: torch.Tensor  # [L, HQ, D / 2] complex, mean
    spread: torch.Tensor  # [L, HQ, D / 2] mean length minus the length of the mean
    omega: torch.Tensor  # [D / 2] radians per position

    @classmethod
    def of_text(cls, model: BlockModel, tokens: torch.Tensor) -> QueryStatistics:
        """Over all of a text ([N]) but its last token, by one dense pass."""
        cache = QueryRecorder(model, len(tokens) - 1)
        Reference.forward(model, tokens, cache)
        centre, length = cache.sums / cache.seq_len, cache.lengths / cache.seq_len
        return cls(centre, length - centre.abs(), cache.omega)

    def rate(self, keys: torch.Tensor, valid: torch.Tensor, seq_len: int, layers: slice) -> torch.Tensor:
        """Scores of lists for the queries after `seq_len` tokens.

        keys: [l * H, N, D] after RoPE; valid: [l * H, N] bool. Returns [l * H, N], not negative, 0 where not valid: the
        best standard score that a query head of the group gives, shifted to start at 0.
        """
        B, N, _ = keys.shape
        ahead = seq_len + 2.0 ** torch.arange(OFFSETS, device=keys.device)
        turn = torch.polar(torch.ones_like(self.omega), ahead.double()[:, None] * self.omega).mean(0)
        centre = (self.centre[layers] * turn).view(B, -1, len(turn)).to(torch.complex64)
        spread = self.spread[layers].view(B, -1, len(turn)).float()
        pairs = complex_pairs(torch.where(valid[..., None], keys, 0.0)).transpose(1, 2)
        scores = (centre @ pairs.conj()).real + spread @ pairs.abs()  # [B, G, N]
        counts = valid.sum(-1).clamp(min=1)[:, None, None]
        mean = scores.sum(-1, keepdim=True) / counts  # what is not valid has score 0
        deviation = torch.where(valid[:, None], scores - mean, 0.0)
        standard = deviation / (deviation.square().sum(-1, keepdim=True) / counts).sqrt().clamp(min=1e-6)
        best = standard.amax(1)
        lowest = torch.where(valid, best, torch.inf).amin(-1, keepdim=True) if N else best
        return torch.where(valid, best - lowest, 0.0)


class QueryRecorder(DenseCache):
    """Dense attention that adds up its queries, turned back to what they were before RoPE."""

    def __init__(self, model: BlockModel, max_len: int) -> None:
        super().__init__(model.shape, max_len, model.device)
        shape = model.shape
        self.omega = model.rope_frequencies.double()
        size = (shape.num_layers, shape.num_q_heads, shape.head_dim // 2)
        self.sums = torch.zeros(size, dtype=torch.complex128, device=model.device)
        self.lengths = torch.zeros(size, dtype=torch.float64, device=model.device)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """See `BlockAttention.attend`."""
        positions = torch.arange(self.seq_len, self.seq_len + q.shape[1], device=q.device)
        back = torch.polar(torch.ones_like(self.omega), -positions[:, None] * self.omega)
        pairs = complex_pairs(q)
        self.sums[layer] += (pairs * back).sum(1)
        self.lengths[layer] += pairs.abs().sum(1)
        return super().attend(layer, q, k, v)


@dataclass(frozen=True)
class TriScorer(TorchScorer):
    """Rates candidates by query statistics instead of by what the policy measures."""

    statistics: QueryStatistics

    def score_layers(self, op: SelectOp, layers: slice) -> Scored:
        """See `Scorer.score_layers`. Attention is still measured: it says how much mass is kept."""
        measured, reader = super().score_layers(op, layers), self.reader
        keys = reader.memory.k_rows[reader.rows(op, layers, reader.padding(op, layers))]
        rated = self.statistics.rate(keys[:, : op.num_candidates], measured.valid, op.seq_len, layers)
        return Scored(rated[:, None], measured.importance, measured.valid)
