"""What running requests hold in the pool now: sums over host bookkeeping, no device is asked."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from hardkv_sglang.lifecycle.request_state import RequestState


@dataclass(frozen=True)
class Occupancy:
    """Output of the running requests that decode under HARD-KV, in tokens and token pages.

    A request's output here starts at the end of its dense prefix. That prefix is left out because compression
    never touches it, and because requests may share it: a sum over requests would count pages that do not exist.
    """

    condensed_tokens: int  # in the condensed tier, dropped ones included: their own pages are freed
    condensed_pages: int  # that hold the survivors of the condensed tokens
    sparse_tokens: int  # in the sparse tier, attended or not: in their own pages
    output_pages: int  # that the whole output holds
    dense_output_pages: int  # that it would hold uncompressed

    @classmethod
    def of(cls, states: Iterable[RequestState], page_size: int) -> Occupancy:
        """Sums over the requests, as of their last planned decode step."""
        condensed_tokens = condensed_pages = sparse_tokens = dense_pages = 0
        for state in states:
            condensed_tokens += state.condensed_end - state.prefix_end
            condensed_pages += state.num_condensed_pages
            sparse_tokens += state.sparse_span
            dense_pages += -(-max(0, state.seq_len - state.prefix_end) // page_size)
        return cls(
            condensed_tokens=condensed_tokens,
            condensed_pages=condensed_pages,
            sparse_tokens=sparse_tokens,
            output_pages=dense_pages - condensed_tokens // page_size + condensed_pages,
            dense_output_pages=dense_pages,
        )

    @property
    def kept_ratio(self) -> float:
        """Share of the output's pages that is still held; 1 while there is no output."""
        return self.output_pages / self.dense_output_pages if self.dense_output_pages else 1.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable sums."""
        return {**asdict(self), "kept_ratio": self.kept_ratio}
