"""Which tokens of a request are in which tier.

A request's tokens, as half-open position ranges; every bound but the last is a multiple of the page size:

    range                  tier       dense slots   freed by
    [0, prefix_end)        dense      live          the radix tree, which owns and shares the prompt's pages
    [prefix_end,
     condensed_end)        condensed  freed         (survivors sit in the request's condensed pages)
    [condensed_end,
     recent_start)         sparse     live          condense event, or release
    [recent_start, len)    recent     live          release
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class RequestState:
    """Tiers of one running request. Owned by the scheduler thread."""

    row: int
    prefix_end: int
    condensed_end: int
    recent_start: int
    observe_from: int  # first position whose query counts for the next select event, or is to
    ring_slot: int | None = None  # where its queries are recorded; None while they are not
    condensed_slots: Any = None
    num_condensed_pages: int = 0
    num_selects: int = 0
    num_condenses: int = 0
    measured_end: int = 0  # end of the positions that the last select event measured
    selected_at: int = 0  # sequence length at the last select event
    survivor_pages: int | None = None  # token pages that the selected survivors need; None while unknown
    is_unread: bool = False  # the survivors have not been counted as experience yet
    longest_list: int = 0  # tokens in the longest condensed list after the next condense event
    condensed_list_bound: int = 0  # tokens in the longest condensed list now
    released: bool = False
    seq_len: int = 0  # tokens with KV at the last planned step
    early_pages: int = 0  # token pages that early events gave back and no event on schedule has made up for
    wakes_at: int = 0  # length before which the planner need not look at the request
    kept_counts: list[int] = field(default_factory=list)  # per (layer, KV head), from the last select event

    @property
    def is_compressed(self) -> bool:
        """Whether any event ran: from then on new KV is approximate and must not enter the radix tree."""
        return self.num_selects > 0

    @property
    def sparse_span(self) -> int:
        """Positions in the sparse tier, kept or not."""
        return self.recent_start - self.condensed_end

    def freed_tokens(self, page_size: int) -> int:
        """Pool tokens that the request holds less than its length says (negative: more)."""
        return self.condensed_end - self.prefix_end - self.num_condensed_pages * page_size


View = tuple[RequestState, int]
"""A running request and its tokens with KV written or in flight."""
