"""What `hooks.py` puts into SGLang's pass over the waiting queue: who is admitted, and who is preempted for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hardkv_sglang.engine import compat
from hardkv_sglang.engine.assembly import Attachment
from hardkv_sglang.engine.request import Request


def around_add_one_req(
    hardkv: Attachment, original: Callable[..., Any], adder: Any, req: Request, *args: Any, **kwargs: Any
) -> Any:
    """add_one_req(self, req, ...): admits by the forecast footprint of all requests instead of by maximal lengths."""
    if not hardkv.runtime.preemption.is_granted(req):
        if adder.hardkv_pass is None:
            running = compat.unfinished(adder.running_batch.reqs)
            adder.hardkv_pass = hardkv.runtime.admission.open(running)
        if not adder.hardkv_pass.fits(compat.room_for(adder, req), adder.can_run_list, req):
            return compat.no_token()
    with compat.without_output_reservation(), compat.admitted_with_eos(req):
        return original(adder, req, *args, **kwargs)


def after_prefill_adder_init(hardkv: Attachment, _result: None, adder: Any, *_args: Any, **_kwargs: Any) -> None:
    """PrefillAdder(page_size, tree_cache, ...): one pass over the waiting queue. Outputs are forecast, not reserved."""
    compat.drop_output_reservation(adder)
    adder.hardkv_pass = None


def around_add_chunked_req(hardkv: Attachment, original: Callable[..., Any], adder: Any, req: Request) -> Any:
    """add_chunked_req(self, req): the next chunk of a prompt that was admitted with all its chunks and its output."""
    with compat.without_output_reservation():
        return original(adder, req)


def around_preempt_to_schedule(
    hardkv: Attachment, original: Callable[..., bool], adder: Any, req: Request, *args: Any
) -> bool:
    """preempt_to_schedule(self, req, ...): the batch is full; True if others were preempted for `req`, which
    add_one_req is asked to admit next. Nobody calls them back if it does not."""
    candidates = compat.preemptible(original, adder, req, *args)
    victims = hardkv.runtime.preemption.choose(adder, req, candidates)
    if not victims:
        return False
    compat.preempt(original, adder, req, *args, victims=victims)
    adder.hardkv_pass = None
    hardkv.runtime.preemption.grant(req, adder.preempt_list[-len(victims) :])
    return True


def after_get_new_batch_prefill_raw(
    hardkv: Attachment, plan: tuple[Any, Any], scheduler: Any, *_args: Any, **_kwargs: Any
) -> None:
    """_get_new_batch_prefill_raw(self, prefill_delayer_single_pass, running_batch): one pass over the waiting queue.
    Up to 0.5.21 a pass that admits nobody forgets whom it preempted."""
    preempted = hardkv.runtime.preemption.end_pass()
    if plan[0] is None:
        for req in preempted:
            scheduler._add_request_to_queue(req)
