"""The forecast as it is defined: every request at every step looked at, admission asked from scratch each time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from math import ceil
from typing import Any

import numpy as np
from lifecycle import relief_definition
from numpy.typing import NDArray

from hardkv_sglang.engine import compat
from hardkv_sglang.engine.admission import Admission
from hardkv_sglang.engine.overrides import is_opted_out
from hardkv_sglang.lifecycle.expectation import KeptShare
from hardkv_sglang.lifecycle.forecast import EVENTS_PER_CYCLE, FORECAST_ERROR, UsageForecast
from hardkv_sglang.lifecycle.request_state import RequestState
from hardkv_sglang.lifecycle.schedule import EventSchedule
from hardkv_sglang.lifecycle.tiers import COUNT_DELAY
from hardkv_sglang.lifecycle.usage_peak import EVENT_POINTS, FORECAST_POINTS, Outlook, Rules


def peak_growth(self: UsageForecast, requests: Sequence[Outlook], kept: KeptShare, events_per_step: int) -> int:
    """Most pool tokens that the requests together will take beyond what they hold now, allowing for errors."""
    columns = [[float(value) for value in column] for column in zip(*requests, strict=True)]
    rules = self.rules
    prompt, held, dense, condensed, aged, first, expected, most = np.array(columns)[:, :, None]  # [N, 1] each
    due = first.clip(min=1)  # overdue events have not happened yet
    first = _queued(due, events_per_step)
    times = _times(float(np.minimum(expected, most).max()), first[:, 0])
    steps = np.minimum(times, expected)
    events = np.where(steps >= first, 1 + np.floor((steps - first) / rules.span), 0)
    # the first event leaves the recent window, later ones take one span each; what they age does not wait
    freed_first = np.floor((dense + due - rules.recent_tokens) / rules.page_size) * rules.page_size
    freed = np.where(events > 0, freed_first.clip(0, rules.max_sparse_span) + (events - 1) * rules.span, 0)
    gone = aged + freed
    floor = np.minimum(gone, rules.min_kept_tokens) * rules.page_size / rules.head_page_tokens
    expected_kept = np.maximum(kept.tokens(gone), floor)
    survivors = np.maximum(condensed, np.minimum(expected_kept, rules.max_condensed_tokens))
    # with the slot of the step to come: requests of one length open their pages in the same step
    usage = prompt + _ceil(rules, dense + steps - freed + 1) + _ceil(rules, np.where(events > 0, survivors, condensed))
    peak = float(np.where(times <= most, usage, 0).sum(0).max())
    return ceil(peak * (1 + FORECAST_ERROR) - held.sum())


def _times(last: float, first: NDArray[Any]) -> NDArray[Any]:
    stride = -(-int(last) // FORECAST_POINTS) | 1
    before = np.ceil(first[np.isfinite(first)]) - 1
    before = np.sort(before)[:: len(before) // EVENT_POINTS + 1]
    return np.concatenate((np.arange(0.0, FORECAST_POINTS + 1) * stride, before.clip(0, last)))


def _queued(first: NDArray[Any], events_per_step: int) -> NDArray[Any]:
    order = np.argsort(first, axis=0, kind="stable")
    waiting = np.arange(len(first))[:, None] * (EVENTS_PER_CYCLE / events_per_step)
    queued = np.empty_like(first)
    queued[order[:, 0]] = np.maximum.accumulate(first[order[:, 0]] - waiting) + waiting
    return queued


def _ceil(rules: Rules, tokens: NDArray[Any]) -> NDArray[Any]:
    return np.ceil(tokens / rules.page_size) * rules.page_size


def need(self: Admission, running: Sequence[Any], admitted: Sequence[Any], req: Any) -> int:
    """Pool tokens that must be free for `req` to start beside the others."""
    outlooks = [running_outlook(self, r) for r in running] + [new_outlook(self, r) for r in [*admitted, req]]
    events_per_step = self.planner.schedule.event_budget(len(outlooks))
    views = [
        (self.roster.states[r], compat.committed_len(r)) for r in [*running, *admitted, req] if r in self.roster.states
    ]
    reserve = relief_definition.copy_pages(self.relief, views) * self.layout.page_size
    return peak_growth(self.forecast, outlooks, self.planner.kept, events_per_step) + reserve


def running_outlook(self: Admission, req: Any) -> Outlook:
    """Outlook of a request that decodes."""
    state = self.roster.states.get(req)
    seq_len = compat.committed_len(req)
    if state is None:
        return _fresh_outlook(self, req, seq_len, prompt=0, held=max(0, seq_len - _prefix_end(self, req)))
    dense = seq_len - state.condensed_end
    condensed = state.num_condensed_pages * self.layout.page_size
    return Outlook(
        prompt=0,
        held=max(0, self.layout.page_ceil(dense)) + condensed,
        dense=dense,
        condensed=condensed,
        aged=state.condensed_end - state.prefix_end,
        first_condense=_steps_to_condense(self.planner.schedule, state, seq_len),
        expected_steps=_expected_steps(self, req),
        most_steps=compat.remaining_tokens(req),
    )


def new_outlook(self: Admission, req: Any) -> Outlook:
    """Outlook of a request that has not been prefilled."""
    uncached = max(0, len(req.origin_input_ids) - compat.cached_len(req))
    return _fresh_outlook(self, req, compat.num_tokens(req), prompt=self.layout.page_ceil(uncached), held=0)


def _fresh_outlook(self: Admission, req: Any, seq_len: int, prompt: int, held: int) -> Outlook:
    prefix_end = _prefix_end(self, req)
    state = RequestState(0, prefix_end, prefix_end, prefix_end, seq_len)
    stays_dense = is_opted_out(compat.custom_params(req))
    return Outlook(
        prompt=prompt,
        held=self.layout.page_ceil(held),
        dense=seq_len - prefix_end,
        condensed=0,
        aged=0,
        first_condense=math.inf if stays_dense else _steps_to_condense(self.planner.schedule, state, seq_len),
        expected_steps=_expected_steps(self, req),
        most_steps=compat.remaining_tokens(req),
    )


def _prefix_end(self: Admission, req: Any) -> int:
    return self.layout.page_ceil(len(req.origin_input_ids))


def _expected_steps(self: Admission, req: Any) -> float:
    remaining = compat.remaining_tokens(req)
    return remaining if req.sampling_params.ignore_eos else min(remaining, self.output_length.mean)


def _steps_to_condense(self: EventSchedule, state: RequestState, seq_len: int) -> int:
    is_worth = state.survivor_pages is None or self._is_worth_a_copy(state)
    if state.sparse_span >= self.condense_span and is_worth:
        return COUNT_DELAY
    missing = max(1, ceil((self.condense_span - state.sparse_span) / self.select_span))
    selected_at = state.recent_start + missing * self.select_span + self.recent_tokens
    return max(selected_at, state.observe_from + self.query_window) - seq_len + COUNT_DELAY
