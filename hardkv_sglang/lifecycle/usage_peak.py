"""The most tokens that requests hold together at the steps ahead: the arithmetic of `forecast.py`, as machine code.

Usage is added up by what changes between two steps, as many terms as there are events, not requests times steps.
"""

from __future__ import annotations

from math import ceil, inf
from typing import Any, NamedTuple

import numpy as np

from hardkv_sglang.lifecycle.compiled import compiled

FORECAST_POINTS = 256  # steps ahead at which usage is forecast, evenly spread up to the last expected token
EVENT_POINTS = 64  # requests before whose next condense event usage is forecast too, evenly chosen


class Outlook(NamedTuple):
    """What the forecast needs to know of one request, in tokens and decode steps; of many, an array [N, 8]."""

    prompt: float  # prompt tokens that still need slots
    held: float  # tokens of the pool that it holds now, without the prompt
    dense: float  # output tokens in dense slots, held or about to be prefilled
    condensed: float  # tokens in condensed pages
    aged: float  # output tokens before the dense ones: condensed, or dropped
    first_condense: float  # steps until the next condense event; infinite for a request that stays dense
    expected_steps: float  # steps for which it is expected to decode
    most_steps: float  # steps after which it has ended in any case


PROMPT, HELD, DENSE, CONDENSED, AGED, FIRST_CONDENSE, EXPECTED_STEPS, MOST_STEPS = range(8)


class Rules(NamedTuple):
    """What bounds the requests of a server, in tokens."""

    page_size: int
    span: int  # from one condense event to the next
    recent_tokens: int
    max_sparse_span: int
    min_kept_tokens: int
    head_page_tokens: int  # condensed tokens that take as much as `page_size` tokens of the pool
    max_condensed_tokens: int  # of the pool


@compiled
def usage_peak(outlooks: Any, order: Any, apart: float, shares: Any, share_span: int, rules: Rules) -> float:
    """Most tokens at any of the steps looked at.

    outlooks: [N, 8] float64; order: [N] int64, rows by the step of the next condense event; apart: steps from one
    condense event to the next in the queue; shares: kept share by age, in steps of `share_span` tokens.
    """
    slots, queue = _queued(outlooks, order, apart)
    times = _times(outlooks, queue)
    earlier = _points_before(times)
    changes, ended, total = _changes(outlooks, slots, earlier, len(times), shares, share_span, rules)
    return _peak(times, changes, ended, total)


@compiled
def insert_last(order: Any, outlooks: Any) -> None:
    """Put the last of [N] requests into the order of the others, in place, behind those that are due as early."""
    place = len(order) - 1
    due = max(outlooks[place, FIRST_CONDENSE], 1.0)
    while place > 0 and max(outlooks[order[place - 1], FIRST_CONDENSE], 1.0) > due:
        order[place] = order[place - 1]
        place -= 1
    order[place] = len(order) - 1


@compiled
def _queued(outlooks: Any, order: Any, apart: float) -> Any:
    """Steps until each condense event, when events wait for their turn: [N] by request, and rising without those that
    never come."""
    slots, queue = np.empty(len(order)), np.empty(len(order))
    latest, num = -inf, 0
    for place, i in enumerate(order):
        waiting = place * apart
        latest = max(latest, max(outlooks[i, FIRST_CONDENSE], 1.0) - waiting)
        slots[i] = latest + waiting
        if slots[i] < inf:
            queue[num] = slots[i]
            num += 1
    return slots, queue[:num]


@compiled
def _times(outlooks: Any, queue: Any) -> Any:
    """Steps ahead at which to look, [T] int64, rising.

    Evenly spread, an odd number of steps apart to meet every phase of a page and a span, and just before events to
    come, where usage is highest.
    """
    last = 0.0
    for i in range(len(outlooks)):
        last = max(last, min(outlooks[i, EXPECTED_STEPS], outlooks[i, MOST_STEPS]))
    stride = -(-int(last) // FORECAST_POINTS) | 1
    step = len(queue) // EVENT_POINTS + 1
    num_events = -(-len(queue) // step)
    times = np.empty(FORECAST_POINTS + 1 + num_events, np.int64)
    even, event = 0, 0
    for point in range(len(times)):
        before_event = inf if event == num_events else min(max(ceil(queue[event * step]) - 1, 0), ceil(last))
        if even <= FORECAST_POINTS and even * stride <= before_event:
            times[point] = even * stride
            even += 1
        else:
            times[point] = int(before_event)
            event += 1
    return times


@compiled
def _points_before(times: Any) -> Any:
    """By step, up to the one after the last: points before it, [times[-1] + 2] int32."""
    earlier = np.empty(times[-1] + 2, np.int32)
    point = 0
    for step in range(len(earlier)):
        while point < len(times) and times[point] < step:
            point += 1
        earlier[step] = point
    return earlier


@compiled
def _changes(
    outlooks: Any, slots: Any, earlier: Any, num_points: int, shares: Any, share_span: int, rules: Rules
) -> Any:
    """What changes at each point, [T + 1]; who grows no more from there on, by the phase of the page, [T + 1, page];
    and what all hold before the first step."""
    page, end = rules.page_size, len(earlier) - 1
    changes, ended = np.zeros(num_points + 1), np.zeros((num_points + 1, page), np.int32)
    total = 0.0
    for i in range(len(outlooks)):
        of = outlooks[i]
        gone = earlier[int(min(of[MOST_STEPS] + 1, end))]  # points [0, gone) lie within the life of the request
        full = min(earlier[int(min(of[EXPECTED_STEPS] + 1, end))], gone)  # it grows during [0, full)
        dense = int(of[DENSE]) + 1  # with the slot of the step to come
        final = -(-(dense + ceil(min(of[EXPECTED_STEPS], end))) // page) * page
        condensed = np.ceil(of[CONDENSED] / page) * page
        total += of[PROMPT] + condensed + dense
        changes[full] += final - dense
        ended[full, dense % page] += 1
        of_events = _events(of, slots[i], changes, earlier, shares, share_span, rules)
        changes[gone] -= of[PROMPT] + final + condensed + of_events
    return changes, ended, total


@compiled
def _events(of: Any, first: float, changes: Any, earlier: Any, shares: Any, share_span: int, rules: Rules) -> float:
    """Enter the condense events of one request; returns what they change together.

    The first leaves the recent window, and what it ages does not wait; later ones free a span each.
    """
    page, end = float(rules.page_size), len(earlier) - 1
    last = min(min(of[EXPECTED_STEPS], of[MOST_STEPS]), float(end))
    at_first = np.ceil(of[CONDENSED] / page) * page
    if first > last:
        return 0.0
    due = max(of[FIRST_CONDENSE], 1.0)
    freed = min(max(np.floor((of[DENSE] + due - rules.recent_tokens) / page) * page, 0.0), float(rules.max_sparse_span))
    before = at_first
    for k in range(int((last - first) / rules.span) + 1):
        survivors = _survivors(of[AGED] + freed, of[CONDENSED], shares, share_span, rules)
        after = np.ceil(survivors / page) * page - freed
        changes[earlier[min(int(np.ceil(first + k * rules.span)), end)]] += after - before
        before = after
        freed += rules.span
    return before - at_first


@compiled
def _survivors(aged: float, condensed: float, shares: Any, share_span: int, rules: Rules) -> float:
    """Pool tokens that survivors of `aged` tokens are expected to take; no event drops what an earlier one has
    condensed."""
    share = shares[min(int(aged) // share_span, len(shares) - 1)]
    floor = min(aged, float(rules.min_kept_tokens)) * rules.page_size / rules.head_page_tokens
    kept = max(share * aged, floor)
    return max(condensed, min(kept, float(rules.max_condensed_tokens)))


@compiled
def _peak(times: Any, changes: Any, ended: Any, total: float) -> float:
    """The largest sum over the requests, with the rest of the last page of each one that grows."""
    page = ended.shape[1]
    growing = np.zeros(page, np.int64)  # requests, by phase
    num, peak = 0, 0.0
    for point in range(len(ended)):
        for phase in range(page):
            growing[phase] += ended[point, phase]
            num += ended[point, phase]
    for point, time in enumerate(times):
        total += changes[point]
        padding, left = 0, -time % page  # of the last page, at phase 0
        for phase in range(page):
            num -= ended[point, phase]
            growing[phase] -= ended[point, phase]
            padding += growing[phase] * (left - phase + (page if phase > left else 0))
        peak = max(peak, total + num * time + padding)
    return peak
