"""What this package reads and writes of SGLang's requests: a misspelt attribute is a type error.

`tests/engine/test_request.py` holds these names against SGLang's classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch


class KVInfo(Protocol):
    """SGLang's `ReqKvInfo`. Up to 0.5.18 it exists only while the request owns slots."""

    kv_allocated_len: int


class KVRecord(Protocol):
    """Row and lengths of a request: fields of `Req` up to 0.5.18, of its `ReqKvInfo` since; see `compat.record_of`."""

    req_pool_idx: int  # not read before the request has a row
    kv_committed_len: int
    cache_protected_len: int


class PrefillBySlots(Protocol):
    """Fields of `Req` up to 0.5.21; see `compat/prefill.py`."""

    prefix_indices: torch.Tensor  # slots of the leading tokens that need no prefill
    extend_range: tuple[int, int]  # positions of the prefill that runs; not read outside of one

    def set_extend_range(self, start: int, end: int) -> None:
        """Move the range of the prefill."""


class PrefillByLength(Protocol):
    """Fields of `Req` since 0.5.22."""

    prefix_len: int  # leading tokens that need no prefill
    extend_end: int  # where the prefill that runs ends; not read outside of one


class Sampling(Protocol):
    """SGLang's `SamplingParams`, normalised."""

    max_new_tokens: int
    ignore_eos: bool
    custom_params: object  # what the client sent


class Request(Protocol):
    """SGLang's `Req`."""

    rid: str
    sampling_params: Sampling
    origin_input_ids: Sequence[int]
    output_ids: Sequence[int]
    full_untruncated_fill_ids: Sequence[int]  # prompt and output, since the last `init_next_round_input`
    last_node: Any  # deepest node of the radix tree on its path: a node, or since 0.5.19 the id of one
    retracted_stain: bool
    kv: KVInfo | None
    to_finish: object  # why the request is to end; None while it goes on

    def finished(self) -> bool:
        """Whether the request has ended."""

    def init_next_round_input(self, tree_cache: Any) -> None:
        """Look up what is cached of the request, before it is admitted."""

    def set_finish_with_abort(self, error_msg: str) -> None:
        """End the request with this message for its client."""
