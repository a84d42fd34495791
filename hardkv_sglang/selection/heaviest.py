"""The heaviest candidates without sorting them: for so many that a sort would not fit beside the model.

Masses are compared by the bits of their floats and added in fixed point, so that the set is the one that sorting gives,
ties included. Temporary memory is that of one chunk, whatever the number of candidates; the time grows linearly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

CHUNK = 1 << 22  # candidates looked at together: about 90 MB of temporary memory
BITS = {torch.float32: torch.int32, torch.float64: torch.int64}
INFINITY = {torch.float32: 0x7F800000, torch.float64: 0x7FF0000000000000}

ONE = 1 << 48
"""Fixed-point units of probability 1: finer than float32 and float64 need, and 2**15 ones fit an int64."""


def fixed_point(mass: torch.Tensor) -> torch.Tensor:
    """Probabilities in int64 units of 1 / ONE, rounded to nearest."""
    return (mass * ONE).round().long()


def heaviest(mass: torch.Tensor, limit: int, chunk: int = CHUNK) -> torch.Tensor:
    """Mask of what is left when the lightest are dropped, one by one, while their masses add up to `limit` at most.

    mass: [N] float32 or float64, not negative; limit: fixed point. Of equal masses the earlier goes first.
    Returns [N] bool. Guarantees: no sync; the same set for any chunk.
    """
    parts = mass.split(chunk)
    return _heaviest(parts, lambda i: fixed_point(parts[i]), torch.full((), limit, device=mass.device))


def best(scores: torch.Tensor, valid: torch.Tensor, count: int, chunk: int = CHUNK) -> torch.Tensor:
    """Mask of the `count` best valid candidates, or of all if there are fewer; of equal scores the later stays.

    scores: [N] float32 or float64, not negative; valid: [N] bool. Returns [N] bool. Guarantees: see `heaviest`.
    """
    exist = valid.split(chunk)
    # on a GPU the sum of a mask takes eight bytes for each of its elements
    num_valid = torch.stack([part.sum() for part in exist]).sum()
    return _heaviest(scores.split(chunk), lambda i: exist[i].long(), num_valid - count) & valid


def _heaviest(parts: Sequence[torch.Tensor], weigh: Callable[[int], torch.Tensor], limit: torch.Tensor) -> torch.Tensor:
    """See `heaviest`; weigh: of a part's number, what dropping each of it adds, [n] int64."""

    def weight_up_to(bits: torch.Tensor) -> torch.Tensor:
        weights = [torch.where(_bits(part) <= bits, weigh(i), 0).sum() for i, part in enumerate(parts)]
        return torch.stack(weights).sum()

    kind = parts[0].dtype
    low = torch.zeros((), dtype=torch.int64, device=limit.device)
    high = torch.full_like(low, INFINITY[kind])
    # the least mass with which the sum exceeds the limit; infinity if none does
    for _ in range(kind.itemsize * 8):
        middle = low + (high - low) // 2
        exceeds = weight_up_to(middle) > limit
        low, high = torch.where(exceeds, low, middle + 1), torch.where(exceeds, middle, high)
        low = torch.minimum(low, high)
    keep, dropped = [], weight_up_to(low - 1)
    for i, part in enumerate(parts):
        bits = _bits(part)
        tied = bits == low
        sums = dropped + torch.where(tied, weigh(i), 0).cumsum(0)
        keep.append((bits > low) | (tied & (sums > limit)))
        dropped = sums[-1] if len(sums) else dropped
    return torch.cat(keep)


def _bits(mass: torch.Tensor) -> torch.Tensor:
    # ascending with the mass; adding zero makes -0.0 the 0.0 that it equals
    return (mass + 0.0).view(BITS[mass.dtype])
