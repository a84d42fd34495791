"""What the future of a running request is expected to be, learned from the requests that this server has seen.

Fed with token and page counts that are equal on every tensor-parallel rank, so that all ranks expect the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

PRIOR_SHARE = 0.7  # share of aged tokens that survive, before this server has measured it: cautious
PRIOR_EVENTS = 2  # select events that an age's prior stands for
SHARE_MEMORY = 256  # select events over which the share of an age is averaged
LENGTH_MEMORY = 1024  # finished requests after which the older half counts half


class KeptShare:
    """Running average of the pool tokens that survivors occupy in whole pages, per token that left the recent window.

    By age, in select intervals: where a cap binds, old requests keep a smaller share than young ones, and one average
    over both would promise memory that young ones do not give back. An age starts with the share of the next younger
    one, the youngest with `prior`.
    """

    def __init__(self, span: int, prior: float = PRIOR_SHARE) -> None:
        self.span = span  # tokens of a select interval
        self.prior = prior
        self._sums: list[float] = []  # of shares, by age
        self._events: list[float] = []
        self.shares: NDArray[np.float64] = np.full(1, prior)  # by age

    def add(self, kept_tokens: int, aged_tokens: int) -> None:
        """Count one settled select event; kept_tokens: of the pool."""
        age = aged_tokens // self.span
        missing = max(0, age + 1 - len(self._sums))
        self._sums += [0.0] * missing
        self._events += [0.0] * missing
        memory = 1 - 1 / SHARE_MEMORY
        self._sums[age] = self._sums[age] * memory + min(1.0, kept_tokens / aged_tokens)
        self._events[age] = self._events[age] * memory + 1
        self.shares = np.empty(len(self._sums))
        share = self.prior
        for i, (total, events) in enumerate(zip(self._sums, self._events, strict=True)):
            share = (share * PRIOR_EVENTS + total) / (PRIOR_EVENTS + events)
            self.shares[i] = share

    def share(self, aged_tokens: int) -> float:
        """Share of so many aged tokens that survivors are expected to occupy."""
        return float(self.shares[min(aged_tokens // self.span, len(self.shares) - 1)])

    def tokens(self, aged_tokens: NDArray[Any]) -> NDArray[Any]:
        """Pool tokens that survivors of so many aged tokens are expected to occupy."""
        ages = aged_tokens.astype(np.int64) // self.span
        return aged_tokens * self.shares[np.minimum(ages, len(self.shares) - 1)]


@dataclass
class OutputLength:
    """Mean output length from finished and running requests alike: decoded tokens over ends.

    The mean of finished requests alone is too small while long ones still run. Before the first end it is infinite,
    and the caller's own bound decides.
    """

    decoded_tokens: float = 0.0
    ends: float = 0.0

    def add_tokens(self, num_tokens: int) -> None:
        """Count tokens decoded in one step."""
        self.decoded_tokens += num_tokens

    def add_end(self) -> None:
        """Count a request that will decode no more."""
        self.ends += 1
        if self.ends >= LENGTH_MEMORY:
            self.decoded_tokens /= 2
            self.ends /= 2

    @property
    def mean(self) -> float:
        """Tokens that a request decodes from now on, however many it has decoded already."""
        return self.decoded_tokens / self.ends if self.ends else math.inf
