"""Where the prefill of a request stands, and what of it the radix tree may take.

Read on 0.5.17 to 0.5.23. Up to 0.5.21 a request has the slots of what needs no prefill (`prefix_indices`) and the
positions of the prefill that runs (`extend_range`). Since 0.5.22 slots are in its row only, and it has two lengths:
`prefix_len` and `extend_end`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch

from hardkv_sglang.engine.compat.requests import protected_len, row_of
from hardkv_sglang.engine.request import PrefillByLength, PrefillBySlots, Request


def _has_lengths(req: Any) -> TypeGuard[PrefillByLength]:
    return hasattr(req, "prefix_len")


def _with_slots(req: Any) -> PrefillBySlots:
    slots: PrefillBySlots = req
    return slots


def cached_len(req: Request) -> int:
    """Leading tokens that already have slots: in the radix tree, or prefilled by an earlier chunk."""
    return int(req.prefix_len) if _has_lengths(req) else len(_with_slots(req).prefix_indices)


def cache_dense_prefix(cache: Callable[..., None], req: Request, tree_cache: Any, **kwargs: Any) -> None:
    """Insert at most the prompt of a retracted request into the radix tree; other requests as stock does.

    What the tree owned already stays owned and locked, also where it reaches into the output: another request with
    the same prompt may have left its first outputs there, and this one reads their slots until it is released.
    """
    end = req.extend_end if _has_lengths(req) else _with_slots(req).extend_range[1]
    dense_end = max(len(req.origin_input_ids), protected_len(req))
    if not req.retracted_stain or end <= dense_end:
        cache(req, tree_cache, **kwargs)
        return
    with _ending_at(req, dense_end):
        cache(req, tree_cache, **kwargs)
    _go_on_from(req, end, tree_cache)


@contextmanager
def _ending_at(req: Any, end: int) -> Iterator[None]:
    """Within the block, the prefill that runs ends at this position."""
    if _has_lengths(req):
        before, req.extend_end = req.extend_end, end
        try:
            yield
        finally:
            req.extend_end = before
        return
    by_slots = _with_slots(req)
    start, stop = by_slots.extend_range
    by_slots.set_extend_range(min(start, end), end)
    try:
        yield
    finally:
        by_slots.set_extend_range(start, stop)


def _go_on_from(req: Any, end: int, tree_cache: Any) -> None:
    """Let the next chunk start at this position: the same shape as the partial last page of a prompt, known to the
    request and not owned by the tree."""
    if _has_lengths(req):
        req.prefix_len = end
        return
    by_slots = _with_slots(req)
    known = by_slots.prefix_indices
    row = tree_cache.req_to_token_pool.req_to_token[row_of(req)]
    by_slots.prefix_indices = torch.cat((known, row[len(known) : end].to(known.dtype)))
