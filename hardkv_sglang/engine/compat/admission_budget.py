"""What SGLang's `PrefillAdder` counts before it admits or preempts, and how to make it count otherwise.

Read on 0.5.17 to 0.5.23. Up to 0.5.20 the adder has two offsets of its own; since 0.5.21 they are those of its
`memory_budget`. Since 0.5.19 `preempt_to_schedule` takes no `server_args`, and since 0.5.22 a pass that admits nobody
queues again whom it has preempted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from hardkv_sglang.engine.compat.prefill import cached_len
from hardkv_sglang.engine.compat.radix_tree import unlocked
from hardkv_sglang.engine.request import Request

NO_ROOM = 1 << 60  # tokens, more than any pool has


def no_token() -> Any:
    """Admission's answer to a request that the pool cannot take now."""
    from sglang.srt.managers.schedule_policy import AddReqResult

    return AddReqResult.NO_TOKEN


def room_for(adder: Any, req: Request, released: Iterable[Request] = ()) -> int:
    """Free and evictable tokens of the pool while the cached prefix of `req` is locked.

    released: requests whose cached prefixes are counted as unlocked.
    """
    with adder._lock_node(req.last_node), unlocked(adder.tree_cache, released):
        return int(adder.token_to_kv_pool_allocator.available_size() + adder.tree_cache.evictable_size())


def prefill_tokens(adder: Any, req: Request) -> int:
    """Tokens of the pool that SGLang asks for before it prefills `req` after what it has admitted; outputs excluded."""
    uncached = len(req.full_untruncated_fill_ids) - cached_len(req)
    return int(_reserved_tokens(adder) + uncached + adder.page_size)


def _reserved_tokens(adder: Any) -> int:
    """Tokens set aside for what the pass has admitted, and for outputs."""
    budget = getattr(adder, "memory_budget", None)
    return int(adder.rem_total_token_offset if budget is None else budget.total_offset)


def _reserve_tokens(adder: Any, num_tokens: int) -> None:
    budget = getattr(adder, "memory_budget", None)
    if budget is None:
        adder.rem_total_token_offset = num_tokens
    else:
        budget.total_offset = num_tokens


def preemptible(stock: Callable[..., bool], adder: Any, req: Request, *args: Any) -> list[Request]:
    """Running requests that SGLang may preempt for `req`, in its order."""
    candidates: list[Request] = []

    def count(candidate: Request) -> int:
        candidates.append(candidate)
        return 0

    # a need that no release meets: SGLang looks at every candidate and gives up
    with _preemption_budget(adder, count):
        stock(adder, req, *args)
    return candidates


def preempt(stock: Callable[..., bool], adder: Any, req: Request, *args: Any, victims: Sequence[Request]) -> None:
    """Let SGLang preempt the victims, which come first in its order, and requeue those that waited longest first.

    SGLang goes on to preempt for every later request of the pass, and collects victims in a set, whose order differs
    between tensor-parallel ranks.
    """
    with _preemption_budget(adder, lambda candidate: math.inf if candidate is victims[-1] else 0):
        stock(adder, req, *args)
    adder.preempt_list[-len(victims) :] = reversed(victims)
    adder.running_batch.batch_is_full = False


@contextmanager
def _preemption_budget(adder: Any, freed: Callable[[Request], float]) -> Iterator[None]:
    """Within the block, preemption lacks more tokens than there are, and a candidate gives back what `freed` says."""
    reserved = _reserved_tokens(adder)
    _reserve_tokens(adder, NO_ROOM)
    adder._get_running_request_total_token_offset = freed
    try:
        yield
    finally:
        del adder._get_running_request_total_token_offset
        _reserve_tokens(adder, reserved)


def drop_output_reservation(adder: Any) -> None:
    """Make a fresh adder forget what it has set aside for the outputs of running requests."""
    budget = getattr(adder, "memory_budget", None)
    _reserve_tokens(adder, adder.cur_rem_token_offset if budget is None else budget.current_offset)


@contextmanager
def without_output_reservation() -> Iterator[None]:
    """Within the block, SGLang checks that prefills fit, and sets nothing aside for the outputs that follow."""
    from sglang.srt.managers import schedule_policy

    clip, schedule_policy.CLIP_MAX_NEW_TOKENS = schedule_policy.CLIP_MAX_NEW_TOKENS, 0
    try:
        yield
    finally:
        schedule_policy.CLIP_MAX_NEW_TOKENS = clip


@contextmanager
def admitted_with_eos(req: Request) -> Iterator[None]:
    """Within the block, `req` may end early: without a radix tree, SGLang admits `ignore_eos` by maximal lengths."""
    sampling = req.sampling_params
    ignore_eos, sampling.ignore_eos = sampling.ignore_eos, False
    try:
        yield
    finally:
        sampling.ignore_eos = ignore_eos
