"""The budget rule: Top-p in one probability space, floor and cap. Pure torch, no sglang.

Sizes: B lists (every layer and KV head of a request), G query heads of a KV head, Q observation queries, N
candidates, V distributions that each choose a Top-p set (1, or Q for the union over queries).

Nothing here reads a value back to the host, so all of it may be queued on a stream. Masses are added in fixed
point: integer sums do not depend on the order of summation, so the same probabilities give the same budget in
any batch, on any device, sorted or not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from hardkv_sglang.selection.heaviest import ONE, best, fixed_point, heaviest

BoundCounts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int, int | None, int], torch.Tensor]
"""`bound_counts` or a kernel that does the same."""

MAX_SORTED = 1 << 22
"""Candidates that are sorted together: sorting takes 36 bytes of temporary memory for each."""


@dataclass(frozen=True)
class Lists:
    """What one event may keep: B lists (every layer and KV head of a request), N candidates each.

    Candidates stand in ascending position. Lists are padded on the left, so that the condensed tokens of a
    short list still touch the sparse span that follows them. Padding may hold anything, NaN included.
    """

    valid: torch.Tensor  # [B, N] bool, candidates that exist
    keys: torch.Tensor | None = None  # [B, N, D] float, for metrics that read keys
    values: torch.Tensor | None = None  # [B, N, D] float, for metrics that read values

    def value_distance(self, weights: torch.Tensor) -> torch.Tensor:
        """Squared distance of each value from the list's mean value under `weights` ([B, N] float, 0 for padding).

        Returns [B, N] in the type of `weights`; arbitrary for padding. Raises `ValueError` without values.
        """
        if self.values is None:
            raise ValueError("the output metric reads Lists.values")
        values = torch.where(self.valid[..., None], self.values, 0.0).to(weights.dtype)
        mean = normalise(weights)[:, None] @ values  # [B, 1, D]
        return (values - mean).square().sum(-1)


@dataclass(frozen=True, kw_only=True)
class Candidates(Lists):
    """Lists and how the observation queries attended them. Invalid queries may hold anything, NaN included."""

    logits2: torch.Tensor  # [B, G, Q, N] float, q.k * scale * log2(e)
    lse2: torch.Tensor  # [B, G, Q] float, base-2 LSE over all tokens that the query attended when decoded
    attended: torch.Tensor  # [B, N] bool, candidates inside that LSE
    query_valid: torch.Tensor  # [Q] bool, observation queries that exist


@dataclass(frozen=True)
class Importance:
    """Attention of the observation queries to the candidates. What is missing to 1 is always-kept mass."""

    distributions: torch.Tensor  # [B, V, N] float, reduced as configured; 0 for padding and invalid queries
    mean: torch.Tensor  # [B, N] float, mean over query heads and valid queries, whatever is configured
    mean_square: torch.Tensor  # [B, N] float, mean over query heads and valid queries of the squared attention
    observed: torch.Tensor  # [] bool, at least one query is valid


@dataclass(frozen=True)
class Scored:
    """Lists with their scores: all that choosing needs, small enough for every list of a request at once."""

    scores: torch.Tensor  # [B, V, N] float, of the metric: not negative, 0 for padding
    importance: Importance
    valid: torch.Tensor  # [B, N] bool
    num_aged: int = 0  # tokens that left the recent window so far, kept or not

    @cached_property
    def order(self) -> torch.Tensor:
        """`ascending_order` of every distribution, [B, V, N] int64."""
        return ascending_order(self.scores, self.valid[:, None, :])

    def parts(self, temperature: torch.Tensor | None) -> Iterator[tuple[Scored, torch.Tensor | None]]:
        """The lists in parts of `MAX_SORTED` candidates at most, one list at least, with their temperatures ([B])."""
        num_lists, size = len(self.scores), max(1, self.scores[0].numel()) if len(self.scores) else 1
        step = max(1, MAX_SORTED // size)
        if num_lists <= step:
            yield self, temperature
            return
        importance = self.importance
        for first in range(0, num_lists, step):
            lists = slice(first, first + step)
            measured = Importance(
                importance.distributions[lists], importance.mean[lists], importance.mean_square[lists],
                importance.observed,
            )  # fmt: skip
            part = Scored(self.scores[lists], measured, self.valid[lists])
            yield part, None if temperature is None else temperature[lists]

    @classmethod
    def join(cls, parts: Sequence[Scored]) -> Scored:
        """Lists of several chunks of layers of one event, in their order."""
        if len(parts) == 1:
            return parts[0]
        names = ("distributions", "mean", "mean_square")
        joined = {name: torch.cat([getattr(part.importance, name) for part in parts]) for name in names}
        return cls(
            torch.cat([part.scores for part in parts]),
            Importance(**joined, observed=parts[0].importance.observed),
            torch.cat([part.valid for part in parts]),
            parts[0].num_aged,
        )


@dataclass(frozen=True)
class Selection:
    """What an event keeps."""

    keep: torch.Tensor  # [B, N] bool
    temperature: torch.Tensor  # [B] float32, to be reused until recalibration
    kept_mass: torch.Tensor  # [B] float32, mean attention mass of always-kept plus kept tokens
    infeasible: torch.Tensor  # [B] bool, calibration clamped: no temperature reaches the target


def droppable(top_p: float) -> int:
    """Most mass, in fixed point, that Top-p leaves out; rounded down, toward keeping."""
    return int((1.0 - top_p) * ONE)


def row_max(values: torch.Tensor, least: float) -> torch.Tensor:
    """Maximum over the last dimension, kept, but at least `least`: also defined for no entries (N = 0)."""
    if values.shape[-1] == 0:
        return values.new_full((*values.shape[:-1], 1), least)
    return values.amax(-1, keepdim=True).clamp(min=least)


def normalise(mass: torch.Tensor) -> torch.Tensor:
    """Shares of the last dimension's sum; zeros stay zeros."""
    total = mass.sum(-1, keepdim=True)
    return mass / torch.where(total > 0, total, 1.0)


def ascending_order(scores: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Candidates from the first to drop to the last to drop.

    scores: [..., N] float, not negative; valid: bool, broadcastable to scores. Returns [..., N] int64.
    Guarantees: invalid candidates first, then ascending score; of equal scores the earlier position first.
    """
    return torch.where(valid, scores, -1.0).argsort(dim=-1, stable=True)


def last_in_order(order: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Mask of the last `counts` candidates of an order.

    order: [..., N] int64, a permutation; counts: [...] int64. Returns [..., N] bool.
    """
    size = order.shape[-1]
    place = torch.arange(size, device=order.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(-1, order, place)
    return rank >= size - counts[..., None]


def top_p_counts(mass: torch.Tensor, order: torch.Tensor, top_p: float) -> torch.Tensor:
    """Smallest number of candidates, best first, that with the always-kept mass reach `top_p`.

    mass: [..., N] float, probabilities over all live tokens (0 for padding), so that what is missing to 1 is
    the always-kept mass; order: [..., N] int64 of `ascending_order`, along which mass does not fall.
    Returns [...] int64: 0 where the always-kept mass alone reaches `top_p`. Below p = 1 only.
    """
    dropped = fixed_point(mass.gather(-1, order)).cumsum(-1)
    return (dropped > droppable(top_p)).sum(-1)


def top_p_set(mass: torch.Tensor, order: torch.Tensor, top_p: float) -> torch.Tensor:
    """Mask [..., N] of the `top_p_counts` best candidates; arguments as there."""
    return last_in_order(order, top_p_counts(mass, order, top_p))


def shared_top_p_set(mass: torch.Tensor, valid: torch.Tensor, top_p: float) -> torch.Tensor:
    """Mask [B, N] of the best candidates of all lists together that reach `top_p` of the total, one per list.

    mass: [B, N] float, in one unit for all lists, what is missing to B being always kept; valid: [B, N] bool. So
    lists lose `1 - top_p` in the mean, and the last token that one list keeps weighs as much as that of any other: no
    other choice of as few tokens loses less. Ties keep the later list, then the later position.
    """
    flat, limit = mass.flatten(), droppable(top_p) * mass.shape[0]
    if flat.numel() > MAX_SORTED:
        return heaviest(flat, limit).view_as(mass)
    order = ascending_order(flat, valid.flatten())
    dropped = fixed_point(flat.gather(-1, order)).cumsum(-1)
    return last_in_order(order, (dropped > limit).sum(-1)).view_as(mass)


def shared_best_set(scores: torch.Tensor, valid: torch.Tensor, count: int) -> torch.Tensor:
    """Mask [B, N] of the `count` best candidates of all lists together; ties as in `shared_top_p_set`.

    scores: [B, N] float, not negative, in one unit for all lists; valid: [B, N] bool.
    """
    if scores.numel() > MAX_SORTED:
        return best(scores.flatten(), valid.flatten(), count).view_as(scores)
    order = ascending_order(scores.flatten(), valid.flatten())
    counts = torch.full((), count, device=order.device)
    return last_in_order(order, counts).view_as(scores) & valid


def bound_counts(
    chosen: torch.Tensor, importance: torch.Tensor, valid: torch.Tensor, floor: int, cap: int | None, unit: int = 1
) -> torch.Tensor:
    """Fill a list up to `floor` and to a multiple of `unit`, and cut it to `cap`, by importance.

    chosen: [B, N] bool, within valid; importance: [B, N] float, not negative; valid: [B, N] bool.
    Returns keep [B, N] bool. Guarantees: chosen candidates before others, then higher importance, then the
    later position; never an invalid candidate; the cap wins over everything.
    """
    if valid.numel() > MAX_SORTED and len(valid) > 1:
        step = max(1, MAX_SORTED // valid.shape[1])
        parts = zip(chosen.split(step), importance.split(step), valid.split(step), strict=True)
        return torch.cat([bound_counts(*part, floor, cap, unit) for part in parts])
    order = ascending_order(importance, valid)
    order = order.gather(-1, chosen.gather(-1, order).to(torch.uint8).argsort(dim=-1, stable=True))
    counts = -(-chosen.sum(-1).clamp(min=floor) // unit) * unit
    most = valid.sum(-1).clamp(max=valid.shape[-1] if cap is None else cap)
    return last_in_order(order, torch.minimum(counts, most))


def mass_kept(importance: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Attention mass that remains, [B] float32: 1 minus the mean importance of what is dropped.

    importance: [B, N] float, mean over query heads and observation queries, 0 for padding; keep: [B, N] bool.
    """
    return (1.0 - importance.masked_fill(keep, 0.0).sum(-1)).float()
