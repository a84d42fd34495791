"""Importance of candidates: attention probabilities over all live tokens, and the metrics made from them.

Sizes as in `top_p.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional

from hardkv_sglang.config import HardKVConfig
from hardkv_sglang.selection.top_p import Candidates, Importance, Lists, normalise, row_max

RKV_OFFSET = 1e-10
"""Added to R-KV scores before the logarithm, as in the papers' code."""
RKV_RESOLUTION = 1e-6
"""R-KV scores that exceed the lowest by less than this fraction of it are equal to it."""
SIMILARITY_TILE = 64
"""Key columns compared at once: [B, N, SIMILARITY_TILE] takes about as much memory as the keys."""


def joint_probabilities(candidates: Candidates) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention probabilities over all live tokens, dropped but revivable ones included.

    With p = 2 ** (logits2 - lse2), a query's always-kept mass is A = max(0, 1 - sum of p over attended
    candidates), and Z = A + sum of p over all valid candidates. Returns p / Z ([B, G, Q, N]) and A / Z
    ([B, G, Q]), float32 at least. Guarantees: each query sums to 1; padding is 0; an invalid query has all
    its mass in A; finite for logits of any finite size.
    """
    kind = torch.promote_types(candidates.logits2.dtype, torch.float32)
    weight = candidates.logits2.to(kind) - candidates.lse2.to(kind)[..., None]
    live = candidates.valid[:, None, None, :] & candidates.query_valid[:, None]
    weight.masked_fill_(~live, -math.inf)
    # a candidate outside the LSE may exceed it, so scale by whichever is larger: then the total is at least 1
    top = row_max(weight, 0.0)
    weight.sub_(top).exp2_()
    attended = weight.masked_fill(~candidates.attended[:, None, None, :], 0.0).sum(-1, keepdim=True)
    always = (torch.exp2(-top) - attended).clamp_(min=0.0)
    total = always + weight.sum(-1, keepdim=True)
    return weight.div_(total), (always / total).squeeze(-1)


def measure_importance(candidates: Candidates, group_reduction: str, query_reduction: str) -> Importance:
    """Reduce the joint probabilities over query heads, then over valid queries.

    The always-kept tokens count as one more token. `mean` averages distributions, hence is one. `max` takes
    the maximum token by token and divides by the sum of all of them, so that Top-p still acts on one
    probability space: p is then the share of that envelope, and attention mass p is not promised. `union`
    does not reduce: every valid query chooses a set of its own.
    """
    probabilities, always = joint_probabilities(candidates)
    num_queries = candidates.query_valid.sum().clamp(min=1)
    per_query, per_query_always = probabilities.mean(1), always.mean(1)  # [B, Q, N], [B, Q]
    square = torch.linalg.vector_norm(probabilities, dim=(1, 2)).square() / (num_queries * probabilities.shape[1])
    mean = per_query.sum(1) / num_queries
    if group_reduction == "max":
        per_query, per_query_always = _renormalise(probabilities.amax(1), always.amax(1))
    if query_reduction == "union":
        distributions = per_query
    elif query_reduction == "mean":
        distributions = per_query.sum(1, keepdim=True) / num_queries
    else:
        per_query_always = per_query_always.masked_fill(~candidates.query_valid, 0.0)
        largest, always = per_query.amax(1, keepdim=True), per_query_always.amax(1, keepdim=True)
        distributions, _ = _renormalise(largest, always)
    return Importance(distributions, mean, square, candidates.query_valid.any())


def _renormalise(mass: torch.Tensor, always: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    total = mass.sum(-1) + always
    total = torch.where(total > 0, total, 1.0)  # no valid query: leave zeros
    return mass / total[..., None], always / total


def attention_scores(importance: Importance, lists: Lists, options: HardKVConfig) -> torch.Tensor:
    """The attention mass itself, [B, V, N]."""
    del lists, options
    return importance.distributions


def snapkv_scores(importance: Importance, lists: Lists, options: HardKVConfig) -> torch.Tensor:
    """Attention mass, max-pooled over neighbouring candidates of the list, [B, V, N].

    SnapKV (arXiv 2404.14469). Pooling is masked again, so padding stays 0. Max-pooling commutes with the
    temperature, so pooling once before calibration is exact.
    """
    width, size = options.pooling_width, lists.valid.shape[-1]
    # one window more than candidates, because pooling refuses to return none
    padded = functional.pad(importance.distributions, (width // 2, width // 2 + 1))
    pooled = functional.max_pool1d(padded, width, stride=1)[..., :size]
    return torch.where(lists.valid[:, None, :], pooled, 0.0)


def output_scores(importance: Importance, lists: Lists, options: HardKVConfig) -> torch.Tensor:
    """Expected squared change of the heads' output when a candidate is dropped, [B, 1, N].

    Without token j the output o becomes o + P_j / (1 - P_j) (o - v_j): to first order the change is P_j |o - v_j|, and
    changes in different directions add in squares. o is taken as the mean of the candidates' values under their mean
    attention, so a head whose values are all alike loses little by dropping them, however much mass they carry.

    What later queries look at is only partly what the observed ones did. `prior_weight` of a list's energy is expected
    on a token at random: spread over all candidates by the distance of their values. The sum stays what was observed.
    """
    distance = torch.where(lists.valid, lists.value_distance(importance.mean), 0.0)
    energy = torch.where(lists.valid, importance.mean_square * distance, 0.0)
    weight = options.prior_weight
    if weight:
        energy = (1.0 - weight) * energy + weight * energy.sum(-1, keepdim=True) * normalise(distance)
    return energy[:, None]


def rkv_scores(importance: Importance, lists: Lists, options: HardKVConfig) -> torch.Tensor:
    """Share of the candidates' attention minus key redundancy, shifted to start at 0, [B, V, N].

    R-KV (arXiv 2505.24133): z = lambda * I - (1 - lambda) * R, with I and R distributions over the valid
    candidates; then z - min z, normalised, plus `RKV_OFFSET`.
    """
    if lists.keys is None:
        raise ValueError("the rkv metric reads Lists.keys")
    valid = lists.valid[:, None, :]
    share = normalise(importance.distributions)
    redundancy = key_redundancy(lists.keys, lists.valid, options.rkv_similarity).to(share.dtype)
    score = options.rkv_lambda * share - (1.0 - options.rkv_lambda) * redundancy[:, None, :]
    lowest = -row_max((-score).masked_fill(~valid, -math.inf), -1.0)
    score = (score - lowest).masked_fill(~valid, 0.0)
    # normalising would blow rounding errors up to a full distribution where all scores are equal
    score = score.masked_fill(score < RKV_RESOLUTION * lowest.abs(), 0.0)
    return torch.where(valid, normalise(score) + RKV_OFFSET, 0.0)


def key_redundancy(keys: torch.Tensor, valid: torch.Tensor, similarity: float) -> torch.Tensor:
    """How much a key repeats others of its list: softmax over j of the mean over i of cos(k_i, k_j).

    keys: [B, N, D] float; valid: [B, N] bool. Returns [B, N], a distribution over the valid candidates. The
    diagonal counts 0, and so does, for every i, the last j other than i with cos(k_i, k_j) > similarity: of
    several similar keys the newest is not the redundant one (R-KV, arXiv 2505.24133). Memory O(N * D) per
    list: column sums come from the sum of the unit keys, never from an [N, N] matrix. Time O(N * N * D).
    """
    unit = torch.where(valid[..., None], keys, 0.0).to(torch.promote_types(keys.dtype, torch.float32))
    unit = functional.normalize(unit, dim=-1)
    squares = unit.square().sum(-1)
    column_sum = (unit * unit.sum(1, keepdim=True)).sum(-1) - squares
    column_sum -= _newest_similar(unit, valid, similarity)
    mean = column_sum / valid.sum(-1, keepdim=True).clamp(min=1)
    # means of cosines lie in [-1, 1]: no maximum to subtract
    return normalise(torch.where(valid, mean.exp(), 0.0))


def _newest_similar(unit: torch.Tensor, valid: torch.Tensor, similarity: float) -> torch.Tensor:
    """Per column j, the sum of cos_ij over the rows i whose last similar column is j; [B, N].

    Walks the columns backwards in tiles, masking rows already served: no scatter, hence deterministic.
    """
    B, N, _ = unit.shape
    position = torch.arange(N, device=unit.device, dtype=torch.int32)
    pending = valid.clone()
    sums = unit.new_zeros(B, N)
    for start in reversed(range(0, N, SIMILARITY_TILE)):
        tile = slice(start, start + SIMILARITY_TILE)
        column = position[tile]
        cosine = unit @ unit[:, tile].transpose(1, 2)  # [B, N, T]
        similar = (cosine > similarity) & (column != position[:, None]) & valid[:, None, tile]
        last = torch.where(similar, column, -1).amax(-1, keepdim=True)  # [B, N, 1]
        served = (column == last) & pending[..., None]
        sums[:, tile] = torch.where(served, cosine, 0.0).sum(1)
        pending &= last.squeeze(-1) < 0
    return sums


def across_distributions(scores: torch.Tensor, importance: Importance) -> torch.Tensor:
    """One importance per candidate, [B, N]: the largest over the distributions.

    scores: [B, V, N] of a metric. With several distributions each is first scaled to the attention mass that
    its query gives to the candidates: queries become comparable, and an invalid one counts for nothing.
    """
    if scores.shape[1] == 1:
        return scores[:, 0]
    return (normalise(scores) * importance.distributions.sum(-1, keepdim=True)).amax(1)


@dataclass(frozen=True)
class Metric:
    """An importance metric: scores >= 0 per distribution and candidate, 0 for padding."""

    score: Callable[[Importance, Lists, HardKVConfig], torch.Tensor]
    unit: Literal["probability", "energy", "rank"]
    """What Top-p acts on: the scores themselves, their share of the sum of all, or calibrated scores."""
    needs_keys: bool = False
    needs_values: bool = False


METRICS = {
    "attention": Metric(attention_scores, "probability"),
    "output": Metric(output_scores, "energy", needs_values=True),
    "snapkv": Metric(snapkv_scores, "rank"),
    "rkv": Metric(rkv_scores, "rank", needs_keys=True),
}
