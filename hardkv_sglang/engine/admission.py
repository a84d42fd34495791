"""Whether one more request fits beside those that run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from hardkv_sglang.engine import compat
from hardkv_sglang.engine.overrides import is_opted_out
from hardkv_sglang.engine.request import Request
from hardkv_sglang.engine.roster import Roster
from hardkv_sglang.lifecycle.expectation import OutputLength
from hardkv_sglang.lifecycle.forecast import OutlookStack, UsageForecast
from hardkv_sglang.lifecycle.planner import LifecyclePlanner
from hardkv_sglang.lifecycle.relief import PressureRelief
from hardkv_sglang.lifecycle.request_state import RequestState
from hardkv_sglang.lifecycle.tiers import running_outlooks
from hardkv_sglang.lifecycle.usage_peak import Outlook


class Admission:
    """Admits a request if the forecast peak of all requests leaves room for the largest copy."""

    def __init__(
        self, planner: LifecyclePlanner, relief: PressureRelief, states: Mapping[Request, RequestState]
    ) -> None:
        self.planner = planner
        self.relief = relief
        self.roster = Roster(planner, states)
        self.output_length = OutputLength()
        self.forecast = UsageForecast(planner.cfg)
        self.layout = planner.cfg.layout

    def open(self, running: Sequence[Request]) -> AdmissionPass:
        """Begin a pass over the waiting queue beside these requests that decode. It ends before the next decode step,
        or when one of them ends or is preempted."""
        return AdmissionPass(self, running)

    def refusal(self, req: Request) -> str | None:
        """Why `req` can never start; None if it can.

        Before a prefill SGLang asks for the prompt and one page more, from the tree or free. What has more than the
        whole pool would wait for ever, and with it everything that is queued behind.
        """
        num, most = len(req.origin_input_ids), self.layout.num_slots - 2 * self.layout.page_size - 1  # page 0 pads
        if num <= most:
            return None
        return f"the prompt has {num} tokens; the KV pool of this server takes prompts of up to {most}"

    def running_outlooks(self, running: Sequence[Request]) -> tuple[NDArray[np.float64], int]:
        """Their outlooks, [N, 8], and the tokens that stay free at the peak: a condense event must be able to copy
        before it frees.

        What relief looks ahead over beyond that is not set aside: it then runs some events early, which costs less than
        the requests that would have to wait.
        """
        rows = self.roster.rows(running)
        lens = np.fromiter(compat.committed_lens(running), np.int64, len(running))
        most_steps = np.maximum(self.roster.last_len[rows] - lens, 0)
        mean_steps = np.where(self.roster.is_exact[rows], math.inf, self.output_length.mean)
        table, page = self.planner.table.by_row, self.layout.page_size
        outlooks = running_outlooks(table, rows, lens, most_steps, mean_steps, page)
        return outlooks, self.relief.largest_copy(rows, lens) * page

    def warm_up(self) -> None:
        """Compile now what would otherwise be compiled while requests wait."""
        self.running_outlooks([])
        self.relief.warm_up()
        self.forecast.warm_up(self.planner.kept)

    def new_outlook(self, req: Request) -> Outlook:
        """Outlook of a request without an event; its output is longer than nothing after a retraction."""
        uncached = max(0, len(req.origin_input_ids) - compat.cached_len(req))
        seq_len = compat.num_tokens(req)
        prefix_end = self.layout.page_ceil(len(req.origin_input_ids))
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


class AdmissionPass:
    """Candidates of one pass over the waiting queue: those that run are looked at once, for all of them."""

    def __init__(self, admission: Admission, running: Sequence[Request]) -> None:
        self.admission = admission
        self.running = running
        self.needed = 0  # tokens of the pool that had to be free for the last candidate
        self._stack: OutlookStack | None = None
        self._newcomers: list[Request] = []  # whom the stack counts beside those that run
        self._reserve = 0

    def fits(self, free_tokens: int, admitted: Sequence[Request], req: Request) -> bool:
        """Whether `req` may start.

        free_tokens: free and evictable tokens of the pool; admitted: requests that will be prefilled in the same step.
        A request that is alone is left to SGLang, or it might wait for ever.
        """
        if not self.running and not admitted:
            return True
        stack, admission = self._stack_with(admitted), self.admission
        stack.push(admission.new_outlook(req))
        self._newcomers.append(req)
        events_per_step = admission.planner.schedule.event_budget(stack.size)
        self.needed = admission.forecast.growth(stack, admission.planner.kept, events_per_step) + self._reserve
        return self.needed <= free_tokens

    def _stack_with(self, admitted: Sequence[Request]) -> OutlookStack:
        """Outlooks of those that run and are admitted."""
        if self._stack is None:
            outlooks, self._reserve = self.admission.running_outlooks(self.running)
            self._stack = OutlookStack(outlooks)
        if self._newcomers != admitted:  # SGLang has not taken the last candidate
            self._stack.truncate(len(self.running))
            self._newcomers = list(admitted)
            for req in admitted:
                self._stack.push(self.admission.new_outlook(req))
        return self._stack
