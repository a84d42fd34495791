"""How much of the pool requests will need: their bounded footprint over the steps to come, not their maximal length.

A compressed request's dense tokens rise to a peak before each condense event and fall after it. Requests that started
together peak together, others do not; so the forecast sums over time instead of adding up the peaks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hardkv_sglang.lifecycle.expectation import KeptShare
from hardkv_sglang.memory_pool.resolved_config import ResolvedConfig

FORECAST_POINTS = 256  # steps ahead at which usage is forecast, evenly spread up to the last expected token
EVENT_POINTS = 64  # requests before whose next condense event usage is forecast too, evenly chosen
FORECAST_ERROR = 0.005  # of the peak: without it, simulations of hundreds of requests in step retract some
EVENTS_PER_CYCLE = 2  # a select event and a condense event


@dataclass(frozen=True)
class Outlook:
    """What the forecast needs to know of one request, in tokens and decode steps."""

    prompt: int  # prompt tokens that still need slots
    held: int  # tokens of the pool that it holds now, without the prompt
    dense: int  # output tokens in dense slots, held or about to be prefilled
    condensed: int  # tokens in condensed pages
    aged: int  # output tokens before the dense ones: condensed, or dropped
    first_condense: float  # steps until the next condense event; infinite for a request that stays dense
    expected_steps: float  # steps for which it is expected to decode
    most_steps: int  # steps after which it has ended in any case


FIELDS = fields(Outlook)


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

    def peak_growth(self, requests: Sequence[Outlook], kept: KeptShare, events_per_step: int) -> int:
        """Most pool tokens that the requests together will take beyond what they hold now, allowing for errors."""
        columns = [[float(getattr(r, f.name)) for r in requests] for f in FIELDS]
        prompt, held, dense, condensed, aged, first, expected, most = np.array(columns)[:, :, None]  # [N, 1] each
        due = first.clip(min=1)  # overdue events have not happened yet
        first = self._queued(due, events_per_step)
        times = self._times(float(np.minimum(expected, most).max()), first[:, 0])
        steps = np.minimum(times, expected)
        events = np.where(steps >= first, 1 + np.floor((steps - first) / self.span), 0)
        # the first event leaves the recent window, later ones take one span each; what they age does not wait
        freed_first = np.floor((dense + due - self.recent_tokens) / self.page_size) * self.page_size
        freed = np.where(events > 0, freed_first.clip(0, self.max_sparse_span) + (events - 1) * self.span, 0)
        gone = aged + freed
        expected_kept = np.maximum(kept.tokens(gone), np.minimum(gone, self.min_kept_tokens))
        survivors = np.maximum(condensed, np.minimum(expected_kept, self.max_condensed_tokens))
        # with the slot of the step to come: requests of one length open their pages in the same step
        usage = prompt + self._ceil(dense + steps - freed + 1) + self._ceil(np.where(events > 0, survivors, condensed))
        peak = float(np.where(times <= most, usage, 0).sum(0).max())
        return ceil(peak * (1 + FORECAST_ERROR) - held.sum())

    def _times(self, last: float, first: NDArray[Any]) -> NDArray[Any]:
        """Steps ahead at which to look, [T].

        Evenly spread, an odd number of steps apart to meet every phase of a page and a span, and just before events to
        come, where usage is highest.
        """
        stride = -(-int(last) // FORECAST_POINTS) | 1
        before = np.ceil(first[np.isfinite(first)]) - 1
        before = np.sort(before)[:: len(before) // EVENT_POINTS + 1]
        return np.concatenate((np.arange(0.0, FORECAST_POINTS + 1) * stride, before.clip(0, last)))

    def _queued(self, first: NDArray[Any], events_per_step: int) -> NDArray[Any]:
        """Steps until each condense event, when select and condense events wait for their turn; [N, 1]."""
        order = np.argsort(first, axis=0, kind="stable")
        waiting = np.arange(len(first))[:, None] * (EVENTS_PER_CYCLE / events_per_step)
        queued = np.empty_like(first)
        queued[order[:, 0]] = np.maximum.accumulate(first[order[:, 0]] - waiting) + waiting
        return queued

    def _ceil(self, tokens: NDArray[Any]) -> NDArray[Any]:
        return np.ceil(tokens / self.page_size) * self.page_size
