"""Running requests side by side: what admission has to know of all of them at once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hardkv_sglang.lifecycle.request_state import RequestState

UNKNOWN = -1  # survivor pages of a request whose counts have not arrived


class Snapshot(NamedTuple):
    """Fields of `RequestState` and lengths, as int64 arrays [N]."""

    prefix_end: NDArray[Any]
    condensed_end: NDArray[Any]
    recent_start: NDArray[Any]
    num_condensed_pages: NDArray[Any]
    observe_from: NDArray[Any]
    selected_at: NDArray[Any]
    survivor_pages: NDArray[Any]  # `UNKNOWN` where there are none
    seq_len: NDArray[Any]

    @classmethod
    def take(cls, states: Sequence[RequestState], seq_lens: Sequence[int]) -> Snapshot:
        """The requests as they are now; seq_lens: their tokens with KV written or in flight."""
        rows = [
            (
                state.prefix_end,
                state.condensed_end,
                state.recent_start,
                state.num_condensed_pages,
                state.observe_from,
                state.selected_at,
                UNKNOWN if state.survivor_pages is None else state.survivor_pages,
                seq_len,
            )
            for state, seq_len in zip(states, seq_lens, strict=True)
        ]
        size = len(cls._fields)
        flat = np.fromiter(chain.from_iterable(rows), np.int64, size * len(rows))
        return cls(*flat.reshape(-1, size).T.copy())

    @property
    def sparse_span(self) -> NDArray[Any]:
        """Positions in the sparse tier, kept or not."""
        return self.recent_start - self.condensed_end
