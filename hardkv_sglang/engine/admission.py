"""Whether one more request fits beside those that run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from hardkv_sglang.engine import compat
from hardkv_sglang.engine.overrides import is_opted_out
from hardkv_sglang.engine.request import Request
from hardkv_sglang.lifecycle.expectation import OutputLength
from hardkv_sglang.lifecycle.forecast import FORECAST_ERROR, Forecast, Outlook, UsageForecast
from hardkv_sglang.lifecycle.planner import LifecyclePlanner
from hardkv_sglang.lifecycle.relief import PressureRelief
from hardkv_sglang.lifecycle.request_state import RequestState
from hardkv_sglang.lifecycle.snapshot import Snapshot


class Admission:
    """Admits a request if the forecast peak of all requests leaves room for the largest copy."""

    def __init__(
        self, planner: LifecyclePlanner, relief: PressureRelief, states: Mapping[Request, RequestState]
    ) -> None:
        self.planner = planner
        self.relief = relief
        self.states = states  # by request
        self.output_length = OutputLength()
        self.forecast = UsageForecast(planner.cfg)
        self.layout = planner.cfg.layout

    def open(self, running: Sequence[Request]) -> AdmissionPass:
        """Begin a pass over the waiting queue beside these requests that decode. It ends before the next decode step,
        or when one of them ends or is preempted."""
        return AdmissionPass(self, running)

    def running_outlooks(self, running: Sequence[Request]) -> tuple[Outlook, int]:
        """A stack of outlooks, and the tokens that stay free at the peak: a condense event must be able to copy before
        it frees.

        What relief looks ahead over beyond that is not set aside: it then runs some events early, which costs less than
        the requests that would have to wait.
        """
        states = [self.states.get(r) for r in running]
        # without a state: just prefilled, or dense for good
        is_fresh = np.fromiter([state is None for state in states], np.bool_, len(states))
        known = [state or self._fresh_state(r) for state, r in zip(states, running, strict=True)]
        of = Snapshot.take(known, compat.committed_lens(running))
        dense, condensed = of.seq_len - of.condensed_end, of.num_condensed_pages * self.layout.page_size
        first = self.planner.schedule.steps_to_condense(of).astype(np.float64)
        first[[i for i in np.flatnonzero(is_fresh) if is_opted_out(compat.custom_params(running[i]))]] = math.inf
        remaining, is_exact = compat.output_bounds(running)
        outlooks = Outlook(
            prompt=np.zeros(len(running)),
            held=(-(-dense // self.layout.page_size) * self.layout.page_size).clip(min=0) + condensed,
            dense=dense,
            condensed=condensed,
            aged=of.condensed_end - of.prefix_end,
            first_condense=first,
            expected_steps=np.where(is_exact, remaining, np.minimum(remaining, self.output_length.mean)),
            most_steps=remaining,
        )
        compressed = of if not is_fresh.any() else Snapshot(*(column[~is_fresh] for column in of))
        reserve = self.relief.largest_copy(compressed)
        return outlooks, reserve * self.layout.page_size

    def new_outlook(self, req: Request) -> Outlook:
        """Outlook of a request without an event; its output is longer than nothing after a retraction."""
        uncached = max(0, len(req.origin_input_ids) - compat.cached_len(req))
        seq_len = compat.num_tokens(req)
        prefix_end = self._prefix_end(req)
        first = self.planner.schedule.steps_to_first_condense(prefix_end, seq_len)
        remaining = compat.remaining_tokens(req)
        return Outlook(
            prompt=self.layout.page_ceil(uncached),
            held=0,
            dense=seq_len - prefix_end,
            condensed=0,
            aged=0,
            first_condense=math.inf if is_opted_out(compat.custom_params(req)) else first,
            expected_steps=remaining if req.sampling_params.ignore_eos else min(remaining, self.output_length.mean),
            most_steps=remaining,
        )

    def _fresh_state(self, req: Request) -> RequestState:
        prefix_end, seq_len = self._prefix_end(req), compat.committed_len(req)
        return RequestState(0, prefix_end, prefix_end, prefix_end, seq_len, seq_len)

    def _prefix_end(self, req: Request) -> int:
        return self.layout.page_ceil(len(req.origin_input_ids))


class AdmissionPass:
    """Candidates of one pass over the waiting queue: those that run are looked at once, for all of them."""

    def __init__(self, admission: Admission, running: Sequence[Request]) -> None:
        self.admission = admission
        self.running = running
        self._outlooks: Outlook | None = None  # a stack of those that run
        self._reserve = 0
        self._forecast: Forecast | None = None
        self._newcomers: list[Request] = []  # whom the forecast counts beside those that run

    def fits(self, free_tokens: int, admitted: Sequence[Request], req: Request) -> bool:
        """Whether `req` may start.

        free_tokens: free and evictable tokens of the pool; admitted: requests that will be prefilled in the same step.
        A request that is alone is left to SGLang, or it might wait for ever.
        """
        if not self.running and not admitted:
            return True
        if self._newcomers != admitted:  # SGLang has not taken whom the forecast counts
            self._forecast, self._newcomers = None, list(admitted)
        outlook = self.admission.new_outlook(req)
        forecast = self._with_added(outlook)
        # a request that is refused waits, and one that only just fits may be one too many: look closely
        if forecast is None or forecast.growth(2 * FORECAST_ERROR) + self._reserve > free_tokens:
            forecast = self._make(outlook)
        self._forecast = forecast
        self._newcomers.append(req)
        return forecast.growth(FORECAST_ERROR) + self._reserve <= free_tokens

    def _with_added(self, outlook: Outlook) -> Forecast | None:
        admission, forecast = self.admission, self._forecast
        if forecast is None or forecast.events_per_step != self._events_per_step():
            return None
        return admission.forecast.add(forecast, outlook, admission.planner.kept)

    def _make(self, outlook: Outlook) -> Forecast:
        admission = self.admission
        if self._forecast is not None:
            together, added = self._forecast.outlooks[0], self._forecast.outlooks[1:]
        else:
            if self._outlooks is None:
                self._outlooks, self._reserve = admission.running_outlooks(self.running)
            together, added = self._outlooks, [admission.new_outlook(r) for r in self._newcomers]
        outlooks = together.stack([*added, outlook])
        return admission.forecast.make(outlooks, admission.planner.kept, self._events_per_step())

    def _events_per_step(self) -> int:
        return self.admission.planner.schedule.event_budget(len(self.running) + len(self._newcomers) + 1)
