"""Where the tokens of many requests are and what that means for memory, request by request in compiled loops.

Functions take the rows that they look at, [N] int64, and the requests' tokens with KV, [N] int64.
"""

from __future__ import annotations

from enum import IntEnum
from math import inf
from typing import Any, NamedTuple

import numpy as np

from hardkv_sglang.lifecycle.compiled import compiled

NEVER = 1 << 40
NOW = 0
COUNT_DELAY = 2  # steps until a select event's counts are on the host, with or without the overlap scheduler
WORTHWHILE_PAGES = 1  # least net gain of an early event


class Stage(IntEnum):
    """How far a request is from giving pages back, in the order in which relief counts on it."""

    DUE = 0  # an event is due anyway
    COUNTING = 1  # selected, its counts are on their way
    CONDENSABLE = 2  # survivors are known
    SELECTABLE = 3  # its queries are recorded
    OBSERVED = 4  # its queries are being recorded
    UNOBSERVED = 5


class Tiers(NamedTuple):
    """Fields of `RequestState` and lengths from which something holds (`NEVER`: it does not), int64 by row."""

    is_managed: Any  # 0 before the first decode step, and for a request that stays dense
    prefix_end: Any
    condensed_end: Any
    recent_start: Any
    condensed_pages: Any
    survivor_pages: Any  # 0 while unknown
    settled_from: Any  # the survivors may be used
    next_condense: Any  # expected; `NOW` for one that only waits for its turn
    observed_from: Any  # enough queries are recorded for a select event; `NEVER` while none are
    due_from: Any  # an event is due
    first_drop: Any  # end of the sparse tier, not a length
    early_pages: Any


class Bounds(NamedTuple):
    """What bounds a request, in tokens unless said otherwise."""

    page_size: int
    recent_tokens: int
    max_sparse_span: int
    min_kept_tokens: int
    head_page_tokens: int  # condensed tokens of a head page
    max_condensed_pages: int
    share_span: int  # from one age of kept shares to the next


@compiled
def running_outlooks(of: Tiers, rows: Any, lens: Any, most_steps: Any, mean_steps: Any, page: int) -> Any:
    """`Outlook` of each request, [N, 8] float64.

    most_steps: steps that it may still decode; mean_steps: that such a request decodes on average; [N] each.
    """
    outlooks = np.empty((len(rows), 8))
    for i, row in enumerate(rows):
        dense, condensed = lens[i] - of.condensed_end[row], of.condensed_pages[row] * page
        outlooks[i, 0] = 0
        outlooks[i, 1] = max(-(-dense // page) * page, 0) + condensed
        outlooks[i, 2] = dense
        outlooks[i, 3] = condensed
        outlooks[i, 4] = of.condensed_end[row] - of.prefix_end[row]
        outlooks[i, 5] = COUNT_DELAY if of.next_condense[row] == NOW else of.next_condense[row] - lens[i]
        if of.next_condense[row] == NEVER:
            outlooks[i, 5] = inf
        outlooks[i, 6] = min(float(most_steps[i]), mean_steps[i])
        outlooks[i, 7] = most_steps[i]
    return outlooks


@compiled
def largest_copy(of: Tiers, rows: Any, lens: Any, shares: Any, bounds: Bounds) -> int:
    """Token pages that the largest condense event to come copies into, or is expected to.

    shares: kept share by age; requests that are not under compression do not count.
    """
    largest = 0
    for i, row in enumerate(rows):
        if not of.is_managed[row]:
            continue
        if lens[i] >= of.settled_from[row]:
            largest = max(largest, of.survivor_pages[row])
        else:
            target = max(_select_target(of, row, lens[i], bounds), of.recent_start[row])
            largest = max(largest, _expected_survivors(of, row, target, shares, bounds))
    return largest


@compiled
def stages_and_gains(of: Tiers, rows: Any, lens: Any, shares: Any, bounds: Bounds) -> Any:
    """`Stage` of each request, and token pages that it is expected to give back with its next events; [N] int64."""
    stages, gains = np.empty(len(rows), np.int64), np.empty(len(rows), np.int64)
    for i, row in enumerate(rows):
        stages[i] = _stage(of, row, lens[i], bounds.page_size)
        gains[i] = _gain(of, row, lens[i], shares, bounds)
    return stages, gains


@compiled
def _stage(of: Tiers, row: int, seq_len: int, page: int) -> int:
    if seq_len >= of.due_from[row]:
        return Stage.DUE.value
    if seq_len >= of.settled_from[row]:
        if _condense_gain(of, row, page) >= WORTHWHILE_PAGES:
            return Stage.CONDENSABLE.value
    elif of.recent_start[row] > of.condensed_end[row]:
        return Stage.COUNTING.value
    if seq_len >= of.observed_from[row]:
        return Stage.SELECTABLE.value
    return Stage.UNOBSERVED.value if of.observed_from[row] == NEVER else Stage.OBSERVED.value


@compiled
def _gain(of: Tiers, row: int, seq_len: int, shares: Any, bounds: Bounds) -> int:
    is_settled = seq_len >= of.settled_from[row]
    if is_settled and _condense_gain(of, row, bounds.page_size) >= WORTHWHILE_PAGES:
        return _condense_gain(of, row, bounds.page_size)
    target = of.recent_start[row]
    if is_settled or target == of.condensed_end[row]:  # another select event comes before its condense event
        target = _select_target(of, row, seq_len, bounds)
        if target <= of.recent_start[row] or target < of.first_drop[row]:
            return 0
    span = (target - of.condensed_end[row]) // bounds.page_size
    return span + of.condensed_pages[row] - _expected_survivors(of, row, target, shares, bounds)


@compiled
def _condense_gain(of: Tiers, row: int, page: int) -> int:
    """Token pages that a condense event of now gives back, less those that it takes; survivors must be known."""
    span = (of.recent_start[row] - of.condensed_end[row]) // page
    return span + of.condensed_pages[row] - of.survivor_pages[row]


@compiled
def _select_target(of: Tiers, row: int, seq_len: int, bounds: Bounds) -> int:
    """End of the sparse tier after a select event of now."""
    aged_end = (seq_len - bounds.recent_tokens) // bounds.page_size * bounds.page_size
    return min(aged_end, of.condensed_end[row] + bounds.max_sparse_span)


@compiled
def _expected_survivors(of: Tiers, row: int, target: int, shares: Any, bounds: Bounds) -> int:
    """Token pages that survivors of all before `target` are expected to need."""
    aged = target - of.prefix_end[row]
    share = shares[min(aged // bounds.share_span, len(shares) - 1)]
    floor = -(-min(aged, bounds.min_kept_tokens) // bounds.head_page_tokens)
    pages = max(-(-int(share * aged) // bounds.page_size), floor, of.condensed_pages[row])
    return min(pages, bounds.max_condensed_pages)
