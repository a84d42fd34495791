"""The heaviest candidates without sorting them: for so many that a sort would not fit beside the model.

Masses are compared by the bits of their floats and added in fixed point, so that the set is the one that sorting gives,
ties included. Temporary memory is that of one chunk, whatever the number of candidates; the time grows linearly.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    chunks = mass.split(chunk)
    low = torch.zeros((), dtype=torch.int64, device=mass.device)
    high = torch.full_like(low, INFINITY[mass.dtype])
    # the least mass with which the sum exceeds the limit; infinity if none does
    for _ in range(mass.dtype.itemsize * 8):
        middle = low + (high - low) // 2
        exceeds = _mass_up_to(chunks, middle) > limit
        low, high = torch.where(exceeds, low, middle + 1), torch.where(exceeds, middle, high)
        low = torch.minimum(low, high)
    one = fixed_point(low.to(BITS[mass.dtype]).view(mass.dtype)).clamp_(min=1)
    droppable = (limit - _mass_up_to(chunks, low - 1)) // one
    keep, seen = [], torch.zeros_like(low)
    for part in chunks:
        bits = _bits(part)
        tied = bits == low
        keep.append((bits > low) | (tied & (seen + tied.cumsum(0) > droppable)))
        seen = seen + tied.sum()
    return torch.cat(keep)


def _bits(mass: torch.Tensor) -> torch.Tensor:
    # ascending with the mass; adding zero makes -0.0 the 0.0 that it equals
    return (mass + 0.0).view(BITS[mass.dtype])


def _mass_up_to(chunks: Sequence[torch.Tensor], bits: torch.Tensor) -> torch.Tensor:
    parts = [torch.where(_bits(part) <= bits, fixed_point(part), 0).sum() for part in chunks]
    return torch.stack(parts).sum()
