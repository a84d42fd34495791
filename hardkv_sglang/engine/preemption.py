"""Which running requests make room for one of higher priority: as few as it needs."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any

from hardkv_sglang.engine import compat
from hardkv_sglang.engine.admission import Admission
from hardkv_sglang.engine.request import Request
from hardkv_sglang.lifecycle.request_state import RequestState


class Preemption:
    """Decides before SGLang releases anybody, so that nobody is thrown out for a request that then does not start."""

    def __init__(self, admission: Admission, states: Mapping[Request, RequestState], page_size: int) -> None:
        self.admission = admission
        self.states = states  # by request
        self.page_size = page_size
        self._granted: Request | None = None  # the request for which others were preempted last, in this pass
        self._preempted: list[Request] = []  # in this pass

    def choose(self, adder: Any, req: Request, candidates: Sequence[Request]) -> Sequence[Request]:
        """The first of the candidates, in their order, without which `req` fits; none if it never fits.

        One fewer would not do, and one at least is named, because the batch is full.
        """
        if not candidates:
            return ()
        req.init_next_round_input(adder.tree_cache)  # what is cached now, as SGLang is about to find out itself

        def fits(num: int) -> bool:
            return self._fits_without(adder, req, candidates[:num])

        if not fits(len(candidates)):
            return ()
        return candidates[: 1 + bisect_left(range(1, len(candidates)), True, key=fits)]

    def _fits_without(self, adder: Any, req: Request, released: Sequence[Request]) -> bool:
        gone = set(map(id, released))
        running = [r for r in compat.unfinished(adder.running_batch.reqs) if id(r) not in gone]
        own = sum(self._own_tokens(r) for r in released)
        room = own + compat.room_for(adder, req, released)
        is_prefillable = compat.prefill_tokens(adder, req) < room
        return is_prefillable and self.admission.open(running).fits(room, adder.can_run_list, req)

    def _own_tokens(self, req: Request) -> int:
        """Pool tokens that only this request holds, without what the radix tree keeps of it."""
        allocated = -(-compat.allocated_len(req) // self.page_size) * self.page_size
        state = self.states.get(req)
        freed = state.freed_tokens(self.page_size) if state is not None else 0
        return allocated - compat.protected_len(req) - freed

    def grant(self, req: Request, preempted: Sequence[Request]) -> None:
        """Note for whom, and whom, SGLang has just preempted."""
        self._granted = req
        self._preempted += preempted

    def is_granted(self, req: Request) -> bool:
        """Whether others were preempted for `req` in this pass: it was found to fit, and they cannot be called back."""
        return req is self._granted

    def note_queued(self, req: Request) -> None:
        """Note that SGLang has queued a request: nobody has to do it again."""
        self._preempted = [preempted for preempted in self._preempted if preempted is not req]

    def end_pass(self) -> list[Request]:
        """Forget the pass over the waiting queue; returns whom it preempted and SGLang has not queued."""
        preempted, self._preempted, self._granted = self._preempted, [], None
        return preempted
