"""How much of the pool requests will need: their bounded footprint over the steps to come, not their maximal length.

A compressed request's dense tokens rise to a peak before each condense event and fall after it. Requests that started
together peak together, others do not; so the forecast sums over time instead of adding up the peaks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, inf
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hardkv_sglang.lifecycle.expectation import KeptShare
from hardkv_sglang.memory_pool.resolved_config import ResolvedConfig

FORECAST_POINTS = 256  # steps ahead at which usage is forecast, evenly spread up to the last expected token
EVENT_POINTS = 64  # requests before whose next condense event usage is forecast too, evenly chosen
FORECAST_ERROR = 0.005  # of the peak: without it, simulations of hundreds of requests in step retract some
EVENTS_PER_CYCLE = 2  # a select event and a condense event
ADDED_SHARE = 16  # one in so many requests may be added to a forecast before it is made anew

Steps = NDArray[np.int64]
Tokens = NDArray[np.int64]


class Outlook(NamedTuple):
    """What the forecast needs to know of one request, in tokens and decode steps; or of many, as arrays [N]."""

    prompt: Any  # prompt tokens that still need slots
    held: Any  # tokens of the pool that it holds now, without the prompt
    dense: Any  # output tokens in dense slots, held or about to be prefilled
    condensed: Any  # tokens in condensed pages
    aged: Any  # output tokens before the dense ones: condensed, or dropped
    first_condense: Any  # steps until the next condense event; infinite for a request that stays dense
    expected_steps: Any  # steps for which it is expected to decode
    most_steps: Any  # steps after which it has ended in any case

    def stack(self, outlooks: Sequence[Outlook]) -> Outlook:
        """A stack with more requests at its end, [N] float64 each."""
        more = np.array(outlooks, dtype=np.float64).reshape(-1, len(self)).T
        return Outlook(*map(np.concatenate, zip(self, more, strict=True)))


@dataclass
class Forecast:
    """Pool tokens that some requests will hold at some steps ahead."""

    outlooks: list[Outlook]  # one stack, and requests that were added since
    held: float  # tokens that all of them hold now
    times: Steps  # [T], rising
    usage: NDArray[np.float64]  # tokens, [T]
    slots: NDArray[np.float64]  # steps ahead at which their next condense events run, at most [N], rising
    events_per_step: int

    def growth(self, margin: float) -> int:
        """Most tokens beyond what the requests hold now, with that share of the peak added."""
        return ceil(float(self.usage.max()) * (1 + margin) - self.held)


class UsageForecast:
    """Pool tokens that requests will hold, step by step."""

    def __init__(self, cfg: ResolvedConfig) -> None:
        options, layout = cfg.options, cfg.layout
        self.page_size = layout.page_size
        self.recent_tokens = options.recent_tokens
        self.max_sparse_span = cfg.max_sparse_span
        self.min_kept_tokens = cfg.min_kept_tokens
        self.max_condensed_tokens = cfg.max_condensed_tokens
        # tokens between two condense events: they follow select events
        select_span = layout.page_ceil(options.select_interval)
        self.span = -(-options.condense_interval // select_span) * select_span
        phases = np.arange(self.page_size)
        self._padding = -(phases[:, None] + phases) % self.page_size  # of tokens by their phase and the step's

    def make(self, outlooks: Outlook, kept: KeptShare, events_per_step: int) -> Forecast:
        """Usage of these requests together, exactly.

        outlooks: a stack; events_per_step: condense and select events of one step.
        """
        first = outlooks.first_condense.clip(min=1)  # overdue events have not happened yet
        slots = self._queued(first, events_per_step)
        times = self._times(np.minimum(outlooks.expected_steps, outlooks.most_steps).max(), slots)
        usage = self._usage(outlooks, slots, times, kept)
        planned = np.sort(slots[np.isfinite(slots)])
        return Forecast([outlooks], float(outlooks.held.sum()), times, usage, planned, events_per_step)

    def add(self, forecast: Forecast, outlook: Outlook, kept: KeptShare) -> Forecast | None:
        """The forecast with one request more, whose events take the first slots that are free.

        To make it anew would move the events of others behind it a little, and the steps that are looked at. None if
        that has been put off for too long, or if the request goes on for longer than the forecast.
        """
        together = [*forecast.outlooks, outlook]
        num_made, steps = len(forecast.outlooks[0].held), min(outlook.expected_steps, outlook.most_steps)
        if (len(together) - 1) * ADDED_SHARE > num_made or steps > forecast.times[-1]:
            return None
        slots, slot = forecast.slots, max(1.0, outlook.first_condense)
        if slot < inf:
            slot = self._free_slot(slots, slot, forecast.events_per_step)
            place = slots.searchsorted(slot)
            slots = np.concatenate((slots[:place], (slot,), slots[place:]))
        usage = self._usage_of_one(outlook, slot, forecast.times, kept)
        usage += forecast.usage
        return Forecast(together, forecast.held + outlook.held, forecast.times, usage, slots, forecast.events_per_step)

    def _usage_of_one(self, of: Outlook, first: float, times: Steps, kept: KeptShare) -> NDArray[np.float64]:
        """Tokens of one request at each of the steps, [T]."""
        steps = np.minimum(times, of.expected_steps)
        usage = self._ceil(steps + (of.dense + 1))
        usage += of.prompt
        if first <= min(of.expected_steps, of.most_steps):
            numbers = (steps - first) // self.span  # of the last condense event, from 0
            has_event = numbers >= 0
            freed = (self._freed_first(of.dense, max(1.0, of.first_condense)) + numbers * self.span) * has_event
            usage -= freed
            survivors = np.where(has_event, self._survivors(of.condensed, of.aged + freed, kept), of.condensed)
            usage += self._ceil(survivors)
        else:
            usage += self._ceil(of.condensed)
        usage *= times <= of.most_steps
        return usage

    def _freed_first(self, dense: Any, due: Any) -> Any:
        """Tokens that the first condense event frees: it leaves the recent window, and what it ages does not wait.

        Later ones free a span each.
        """
        pages = (dense + due - self.recent_tokens) // self.page_size
        return np.minimum(np.maximum(pages * self.page_size, 0), self.max_sparse_span)

    def _survivors(self, condensed: Any, aged: NDArray[Any], kept: KeptShare) -> NDArray[Any]:
        expected = np.maximum(kept.tokens(aged), np.minimum(aged, self.min_kept_tokens))
        return np.maximum(condensed, np.minimum(expected, self.max_condensed_tokens))

    def _usage(self, of: Outlook, first: NDArray[np.float64], times: Steps, kept: KeptShare) -> NDArray[np.float64]:
        """Tokens at each of the steps, [T].

        Added up by what changes between two steps: as many terms as there are events, not requests times steps.
        """
        end = int(times[-1]) + 1
        earlier = np.zeros(end + 2, np.int64)  # by step: points before it
        np.cumsum(np.bincount(times, minlength=end + 1), out=earlier[1:])
        most = of.most_steps.clip(max=end).astype(np.int64)
        gone = earlier[(most + 1).clip(max=end)]  # points [0, gone) lie within the life of a request
        expected = np.minimum(of.expected_steps, end)
        full = np.minimum(earlier[(expected.astype(np.int64) + 1).clip(max=end)], gone)  # it grows during [0, full)
        dense = of.dense.astype(np.int64) + 1  # with the slot of the step to come
        final = self._ceil(dense + np.ceil(expected))
        event_points, change, changes = self._events(of, first, np.minimum(expected, most), earlier, end, kept)
        base = of.prompt + self._ceil(of.condensed)
        deltas = np.bincount(full, final - dense, end_of := len(times) + 1)
        deltas -= np.bincount(gone, base + final + changes, end_of)
        deltas += np.bincount(event_points, change, end_of)
        deltas[0] += (base + dense).sum()
        return deltas.cumsum()[:-1] + self._growing(dense, full, times)

    def _growing(self, dense: Tokens, full: NDArray[np.int64], times: Steps) -> NDArray[np.float64]:
        """Tokens that requests have beyond `dense` while they grow, with the rest of the last page, [T]."""
        end = len(times) + 1
        ends = np.bincount(dense % self.page_size * end + full, minlength=self.page_size * end)
        growing = ends.reshape(self.page_size, end)[:, :0:-1].cumsum(1)[:, ::-1]  # [phase, T]
        padding = self._padding[:, times % self.page_size]
        return growing.sum(0) * times + np.einsum("pt,pt->t", growing, padding)

    def _events(
        self,
        of: Outlook,
        first: NDArray[np.float64],
        last: NDArray[np.float64],
        earlier: NDArray[np.int64],
        end: int,
        kept: KeptShare,
    ) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
        """All condense events up to step `last` of each request: the point from which each counts, what it changes,
        and what all those of a request change, [N]."""
        is_due = first <= last
        counts = np.zeros(len(first), np.int64)
        counts[is_due] = 1 + (last[is_due] - first[is_due]) // self.span
        ends = counts.cumsum()
        due = np.where(is_due, of.first_condense.clip(min=1), 0)
        of_requests = np.array((first, self._freed_first(of.dense, due), of.aged, of.condensed, ends - counts))
        times, freed, aged, condensed, starts = np.repeat(of_requests, counts, axis=1)
        later = (np.arange(len(times)) - starts) * self.span  # steps since the first event, and tokens freed since
        freed += later
        aged += freed
        times += later
        after = self._ceil(self._survivors(condensed, aged, kept)) - freed
        before = np.empty_like(after)
        before[1:] = after[:-1]
        at_first = self._ceil(of.condensed[is_due])
        before[(ends - counts)[is_due]] = at_first
        changes = np.zeros(len(first))
        changes[is_due] = after[ends[is_due] - 1] - at_first
        return earlier[np.ceil(times).astype(np.int64).clip(max=end)], after - before, changes

    def _times(self, last: float, slots: NDArray[np.float64]) -> Steps:
        """Steps ahead at which to look, [T], rising.

        Evenly spread, an odd number of steps apart to meet every phase of a page and a span, and just before events to
        come, where usage is highest.
        """
        stride = -(-int(last) // FORECAST_POINTS) | 1
        before = np.ceil(np.sort(slots[np.isfinite(slots)])) - 1
        before = before[:: len(before) // EVENT_POINTS + 1].clip(0, ceil(last))
        times = np.concatenate((np.arange(FORECAST_POINTS + 1) * stride, before.astype(np.int64)))
        times.sort()
        return times

    def _queued(self, first: NDArray[np.float64], events_per_step: int) -> NDArray[np.float64]:
        """Steps until each condense event, when select and condense events wait for their turn; [N]."""
        order = np.argsort(first, kind="stable")
        waiting = np.arange(len(first)) * (EVENTS_PER_CYCLE / events_per_step)
        queued = np.empty_like(first)
        queued[order] = np.maximum.accumulate(first[order] - waiting) + waiting
        return queued

    def _free_slot(self, slots: NDArray[np.float64], due: float, events_per_step: int) -> float:
        """First step from `due` on that is as far from all slots as events are from each other."""
        apart = EVENTS_PER_CYCLE / events_per_step
        later = slots[slots.searchsorted(due - apart, side="right") :]
        if not len(later) or later[0] >= due + apart:
            return due
        has_gap = np.empty(len(later), np.bool_)
        np.greater_equal(later[1:] - later[:-1], 2 * apart, out=has_gap[:-1])
        has_gap[-1] = True
        return float(later[has_gap.argmax()]) + apart

    def _ceil(self, tokens: NDArray[Any]) -> NDArray[np.float64]:
        return np.ceil(tokens / self.page_size) * self.page_size
