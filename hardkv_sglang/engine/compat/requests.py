"""What a request holds and may still do.

Read on 0.5.17 to 0.5.23. Up to 0.5.18 a request keeps row and lengths itself and has `kv` only while it owns slots;
since 0.5.19 they are fields of `kv`, which is always there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

from hardkv_sglang.engine.request import KVInfo, KVRecord, Request


def record_of(req: Request) -> KVRecord:
    """Where SGLang keeps the request's row and lengths."""
    return cast(KVRecord, req if hasattr(req, "kv_committed_len") else req.kv)


def holds_kv(req: Request) -> bool:
    """Whether the request owns a row and KV slots."""
    return req.kv is not None and getattr(req.kv, "holds_kv", True)


def _kv_info(req: Request) -> KVInfo:
    assert req.kv is not None, f"request {req.rid} holds no KV"
    return req.kv


def row_of(req: Request) -> int:
    """Row of the request in req_to_token."""
    return int(record_of(req).req_pool_idx)


def committed_len(req: Request) -> int:
    """Tokens whose KV is written or in flight."""
    return int(record_of(req).kv_committed_len)


def committed_lens(reqs: Sequence[Request]) -> list[int]:
    """`committed_len` of many requests; where they keep it is asked once."""
    records: Iterable[KVRecord] = cast(Any, reqs)
    if reqs and record_of(reqs[0]) is not reqs[0]:
        records = [cast(KVRecord, req.kv) for req in reqs]
    return [record.kv_committed_len for record in records]


def settled_len(req: Request) -> int:
    """Tokens with KV, without the step that the overlap scheduler has launched beyond the end of the request."""
    return min(committed_len(req), num_tokens(req) - 1)


def allocated_len(req: Request) -> int:
    """Positions with an allocated slot."""
    return int(_kv_info(req).kv_allocated_len)


def protected_len(req: Request) -> int:
    """Leading tokens that the radix tree owns."""
    return int(record_of(req).cache_protected_len)


def truncate_kv(req: Request, length: int) -> None:
    """Make SGLang believe that the request holds `length` tokens of KV; the rest has been freed."""
    record_of(req).kv_committed_len = length
    _kv_info(req).kv_allocated_len = length


def num_tokens(req: Request) -> int:
    """Tokens of prompt and output."""
    return len(req.origin_input_ids) + len(req.output_ids)


def remaining_tokens(req: Request) -> int:
    """Tokens that the request may still generate."""
    return max(req.sampling_params.max_new_tokens - len(req.output_ids), 0)


def last_len(req: Request) -> int:
    """`committed_len` after the last decode step of a request that has been prefilled and generates all it may.

    The prefill gives the first token; the KV of the last token is never written.
    """
    return len(req.origin_input_ids) + max(req.sampling_params.max_new_tokens - 1, 0)


def custom_params(req: Request) -> object:
    """What the client sent as free-form parameters: any JSON value, of any size and depth. SGLang adds the request
    itself to an object."""
    return req.sampling_params.custom_params


def refused_sampling(req: Request) -> str | None:
    """Why a request cannot be compressed for the way it is sampled; None if it can.

    Beams, which 0.5.19 and later have, are rows of a batch without a request, over slots of their leader's.
    """
    if (getattr(req.sampling_params, "beam_width", None) or 1) > 1:
        return "beam search is not served with --kv-compression; leave out beam_width"
    return None


def is_ending(req: Request) -> bool:
    """Whether the request has ended, or is to end with the reason that SGLang has given it."""
    return req.finished() or req.to_finish is not None


def unfinished(reqs: Iterable[Request]) -> list[Request]:
    """Requests without those that have ended and hold nothing, but are not filtered out of their batch yet."""
    return [req for req in reqs if not req.finished()]


def active_requests(last_batch: Any, running_batch: Any) -> list[Request]:
    """Requests of the scheduler's batches, each once."""
    batches = [last_batch]
    if running_batch is not None and running_batch is not last_batch:
        batches.append(running_batch)
    return list(dict.fromkeys(req for batch in batches if batch is not None for req in batch.reqs))
