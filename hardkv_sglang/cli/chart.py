"""A series of numbers as one line of text."""

from __future__ import annotations

from collections.abc import Sequence

BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], most: float, width: int) -> str:
    """The newest `width` values as bars, from zero to `most`; larger ones are cut off."""
    scale = (len(BARS) - 1) / most if most > 0 else 0.0
    return "".join(BARS[min(len(BARS) - 1, max(0, round(value * scale)))] for value in values[-width:])
