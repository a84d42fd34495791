"""What the future of a running request is expected to be, learned from the requests that this server has seen.

Fed with token and page counts that are equal on every tensor-parallel rank, so that all ranks expect the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

PRIOR_KEPT_FRACTION = (
    0.7  # share of aged tokens that condensed pages hold, before this server has measured it: a cautious
)
# start costs nothing, because requests that start later do not peak together with the first ones
PRIOR_TOKENS = 4096  # aged tokens that the prior stands for
SHARE_MEMORY = 256  # select events over which the kept share is averaged
LENGTH_MEMORY = 1024  # finished requests after which the older half counts half


@dataclass
class KeptShare:
    """Running average of the tokens that survivors occupy in whole pages, per token that left the recent window."""

    kept_tokens: float = PRIOR_KEPT_FRACTION * PRIOR_TOKENS
    aged_tokens: float = PRIOR_TOKENS

    def add(self, kept_tokens: int, aged_tokens: int) -> None:
        """Count one settled select event."""
        memory = 1 - 1 / SHARE_MEMORY
        self.kept_tokens = self.kept_tokens * memory + kept_tokens
        self.aged_tokens = self.aged_tokens * memory + aged_tokens

    @property
    def fraction(self) -> float:
        """Expected share, at most 1."""
        return min(1.0, self.kept_tokens / self.aged_tokens)


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
