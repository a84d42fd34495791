"""Whether one more request fits beside those that run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from hardkv_sglang.engine import compat
from hardkv_sglang.engine.overrides import is_opted_out
from hardkv_sglang.engine.request import Request
from hardkv_sglang.lifecycle.expectation import OutputLength
from hardkv_sglang.lifecycle.forecast import Outlook, UsageForecast
from hardkv_sglang.lifecycle.planner import LifecyclePlanner
from hardkv_sglang.lifecycle.relief import PressureRelief
from hardkv_sglang.lifecycle.request_state import RequestState


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

    def fits(self, free_tokens: int, running: Sequence[Request], admitted: Sequence[Request], req: Request) -> bool:
        """Whether `req` may start.

        free_tokens: free and evictable tokens of the pool; running: requests that decode; admitted: requests that
        will be prefilled in the same step. A request that is alone is left to SGLang, or it might wait for ever.
        """
        if not running and not admitted:
            return True
        outlooks = [self._running_outlook(r) for r in running] + [self._new_outlook(r) for r in [*admitted, req]]
        events_per_step = self.planner.schedule.event_budget(len(outlooks))
        peak = self.forecast.peak_growth(outlooks, self.planner.kept, events_per_step)
        return peak + self._reserve([*running, *admitted, req]) <= free_tokens

    def _reserve(self, reqs: Sequence[Request]) -> int:
        """Tokens that stay free at the peak: a condense event must be able to copy before it frees.

        What relief looks ahead over beyond that is not set aside: it then runs some events early, which costs less than
        the requests that would have to wait.
        """
        views = [(self.states[r], compat.committed_len(r)) for r in reqs if r in self.states]
        return self.relief.copy_pages(views) * self.layout.page_size

    def _running_outlook(self, req: Request) -> Outlook:
        state = self.states.get(req)
        seq_len = compat.committed_len(req)
        if state is None:
            # just prefilled, or dense for good
            return self._fresh_outlook(req, seq_len, prompt=0, held=max(0, seq_len - self._prefix_end(req)))
        dense = seq_len - state.condensed_end
        condensed = state.num_condensed_pages * self.layout.page_size
        return Outlook(
            prompt=0,
            held=max(0, self.layout.page_ceil(dense)) + condensed,
            dense=dense,
            condensed=condensed,
            aged=state.condensed_end - state.prefix_end,
            first_condense=self.planner.schedule.steps_to_condense(state, seq_len),
            expected_steps=self._expected_steps(req),
            most_steps=compat.remaining_tokens(req),
        )

    def _new_outlook(self, req: Request) -> Outlook:
        uncached = max(0, len(req.origin_input_ids) - compat.cached_len(req))
        return self._fresh_outlook(req, compat.num_tokens(req), prompt=self.layout.page_ceil(uncached), held=0)

    def _fresh_outlook(self, req: Request, seq_len: int, prompt: int, held: int) -> Outlook:
        """Outlook of a request without an event; its output is longer than nothing after a retraction."""
        prefix_end = self._prefix_end(req)
        state = RequestState(0, prefix_end, prefix_end, prefix_end, seq_len, seq_len)
        stays_dense = is_opted_out(compat.custom_params(req))
        return Outlook(
            prompt=prompt,
            held=self.layout.page_ceil(held),
            dense=seq_len - prefix_end,
            condensed=0,
            aged=0,
            first_condense=math.inf if stays_dense else self.planner.schedule.steps_to_condense(state, seq_len),
            expected_steps=self._expected_steps(req),
            most_steps=compat.remaining_tokens(req),
        )

    def _prefix_end(self, req: Request) -> int:
        return self.layout.page_ceil(len(req.origin_input_ids))

    def _expected_steps(self, req: Request) -> float:
        remaining = compat.remaining_tokens(req)
        return remaining if req.sampling_params.ignore_eos else min(remaining, self.output_length.mean)
