"""SGLang's own rows, allocator, radix tree and requests, made and moved as its scheduler does, on every release.

For scripts that run in a process of their own.
"""

from __future__ import annotations

import inspect
from array import array
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import Req, ReqKvInfo
from sglang.srt.managers.scheduler_components.invariant_checker import SchedulerInvariantChecker
from sglang.srt.mem_cache import common
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.sampling.sampling_params import SamplingParams

from hardkv_sglang.engine import compat
from hardkv_sglang.engine.platform.cpu import TorchCpuPlatform


def make_allocator(num_tokens: int, page_size: int) -> Any:
    """The allocator that a CPU server uses."""
    kind = TorchCpuPlatform().get_paged_allocator_cls() or PagedTokenToKVPoolAllocator
    return kind(num_tokens, page_size, torch.bfloat16, "cpu", None, False)


def make_cache(has_tree: bool, rows: Any, allocator: Any, page_size: int) -> Any:
    """The cache that a server has by default, or with `--disable-radix-cache`."""
    params = CacheInitParams(
        disable=not has_tree, req_to_token_pool=rows, token_to_kv_pool_allocator=allocator, page_size=page_size
    )
    if has_tree and not hasattr(ReqKvInfo, "holds_kv"):  # up to 0.5.18
        from sglang.srt.mem_cache.radix_cache import RadixCache

        return RadixCache(params)
    try:
        from sglang.srt.mem_cache.chunk_cache import ChunkCache
    except ImportError:  # since 0.5.22 one class with and without a tree
        ChunkCache = None
    if not has_tree and ChunkCache is not None:
        return ChunkCache(params)
    from sglang.srt.mem_cache.unified_cache.components import ComponentType
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

    params.tree_components = (ComponentType.FULL,)
    return UnifiedRadixCache(params)


def make_request(rid: str, prompt: Sequence[int], most: int, ignore_eos: bool = True, **fields: Any) -> Req:
    """A request as the scheduler has it before it is queued; custom_params among the fields goes to its sampling."""
    sampling = SamplingParams(
        max_new_tokens=most, ignore_eos=ignore_eos, custom_params=fields.pop("custom_params", None)
    )
    sampling.normalize(None)
    return Req(rid, "", array("q", prompt), sampling, **fields)


def hold(req: Req, num_tokens: int) -> None:
    """The request has slots for so many tokens, and their KV."""
    if compat.record_of(req) is req:
        req.kv = ReqKvInfo(kv_allocated_len=num_tokens, swa_evicted_seqlen=0)
    compat.truncate_kv(req, num_tokens)


def lock(cache: Any, req: Req) -> None:
    """As an admission does."""
    if hasattr(cache, "lock"):
        req.lock = cache.lock(req.last_node)
        return
    receipt = cache.inc_lock_ref(req.last_node)
    if hasattr(req, "lock_receipt"):
        req.lock_receipt = receipt.to_dec_params()


def cached_slots(cache: Any, req: Req) -> torch.Tensor:
    """Slots of what a match found."""
    return req.prefix_indices if hasattr(req, "prefix_indices") else cache.prefix_device_indices(req)


def matched_slots(cache: Any, key: Any) -> torch.Tensor:
    """Slots that the tree has for a key."""
    match = cache.match_prefix(MatchPrefixParams(key=key))
    if hasattr(match, "device_indices"):
        return match.device_indices
    return cache.path_device_indices(match.last_device_node)[: match.device_prefix_len]


def set_prefill(req: Req, start: int, end: int) -> None:
    """The prefill that runs goes from `start` to `end`."""
    if hasattr(req, "prefix_len"):
        req.prefix_len, req.extend_end = start, end
    else:
        req.set_extend_range(start, end)


def prefill_of(req: Req) -> int:
    """Where the prefill that runs ends."""
    return req.extend_end if hasattr(req, "extend_end") else req.extend_range[1]


def stock_cache_unfinished(req: Req, cache: Any, **kwargs: Any) -> None:
    """What SGLang does with a prefilled chunk; whether more follow is not told since 0.5.22."""
    if hasattr(common, "checkpoint_kv_cache"):
        common.checkpoint_kv_cache(req, cache)
    else:
        common.maybe_cache_unfinished_req(req, cache, **kwargs)


def stock_release(req: Req, cache: Any, is_insert: bool) -> None:
    """What SGLang does at the end of a request, or without insertion at its retraction."""
    name = "checkpoint" if "checkpoint" in inspect.signature(common.release_kv_cache).parameters else "is_insert"
    common.release_kv_cache(req, cache, **{name: is_insert})


def reserved_tokens(adder: Any) -> int:
    """Tokens that an adder has set aside."""
    return adder.memory_budget.total_offset if hasattr(adder, "memory_budget") else adder.rem_total_token_offset


def make_checker(**given: Any) -> SchedulerInvariantChecker:
    """SGLang's memory check of one rank of a plain model."""
    fields = {
        "is_hybrid_swa": False, "is_hybrid_ssm": False, "disaggregation_mode": None, "full_tokens_per_layer": None,
        "swa_tokens_per_layer": None, "server_args": SimpleNamespace(), "scheduler_stage_metrics": None, **given,
    }  # fmt: skip
    known = inspect.signature(SchedulerInvariantChecker).parameters
    return SchedulerInvariantChecker(**{name: value for name, value in fields.items() if name in known})
