"""Accessors over SGLang objects whose shape changes between releases; the only file that knows such differences."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hardkv_sglang.engine.request import KVInfo, Request, TreeNode

NO_ROOM = 1 << 60  # tokens, more than any pool has


class SglangPageAllocator:
    """SGLang's paged allocator as `lifecycle.PageAllocator`."""

    def __init__(self, tree_cache: Any, allocator: Any, req_to_token: torch.Tensor) -> None:
        self.tree_cache = tree_cache
        self.allocator = allocator
        self.req_to_token = req_to_token

    def alloc_pages(self, num_pages: int) -> torch.Tensor | None:
        """Slots of fresh pages, [num_pages * page_size] int64; cached prefixes nobody uses are evicted for them."""
        from sglang.srt.mem_cache.common import evict_from_tree_cache

        num_tokens = num_pages * self.allocator.page_size
        evict_from_tree_cache(self.tree_cache, num_tokens)
        slots: torch.Tensor | None = self.allocator.alloc(num_tokens)
        return slots

    def available_pages(self) -> int:
        """Token pages that are free, or cached and used by nobody."""
        tokens = self.allocator.available_size() + self.tree_cache.evictable_size()
        return int(tokens) // int(self.allocator.page_size)

    def free_pages(self, slots: torch.Tensor) -> None:
        """Return pages given by `alloc_pages`."""
        self.allocator.free_segment(slots, start_pos=0)

    def free_row(self, row: int, start: int, end: int) -> None:
        """Return the pages behind positions `[start, end)` of a row."""
        self.allocator.free_segment(self.req_to_token[row, start:end], start_pos=start)


def holds_kv(req: Request) -> bool:
    """Whether the request owns a row and KV slots."""
    return req.kv is not None


def _kv_info(req: Request) -> KVInfo:
    assert req.kv is not None, f"request {req.rid} holds no KV"
    return req.kv


def row_of(req: Request) -> int:
    """Row of the request in req_to_token."""
    return int(req.req_pool_idx)


def committed_len(req: Request) -> int:
    """Tokens whose KV is written or in flight."""
    return int(req.kv_committed_len)


def committed_lens(reqs: Iterable[Request]) -> list[int]:
    """`committed_len` of many requests."""
    return [req.kv_committed_len for req in reqs]


def settled_len(req: Request) -> int:
    """Tokens with KV, without the step that the overlap scheduler has launched beyond the end of the request."""
    return min(committed_len(req), len(req.origin_input_ids) + len(req.output_ids) - 1)


def allocated_len(req: Request) -> int:
    """Positions with an allocated slot."""
    return int(_kv_info(req).kv_allocated_len)


def protected_len(req: Request) -> int:
    """Leading tokens that the radix tree owns."""
    return int(req.cache_protected_len)


def prefix_path(req: Request) -> list[tuple[int, int]]:
    """The request's nodes in the radix tree, from the root down: (node id, tokens up to the end of the node)."""
    nodes: list[TreeNode] = []
    node = req.last_node
    while node is not None and node.parent is not None:
        nodes.append(node)
        node = node.parent
    path, end = [], 0
    for node in reversed(nodes):
        end += len(node.key)
        path.append((int(node.id), end))
    return path


def prefix_node(req: Request) -> int | None:
    """Id of the deepest node on the request's path; it changes once, when its own prefill is inserted."""
    return None if req.last_node is None else int(req.last_node.id)


def can_share_prefixes(model_runner: Any) -> bool:
    """Whether decode may attend a prefix for several requests at once: there is a radix tree, and results may depend
    on the batch."""
    args = model_runner.server_args
    return not args.disable_radix_cache and not args.enable_deterministic_inference


def truncate_kv(req: Request, length: int) -> None:
    """Make SGLang believe that the request holds `length` tokens of KV; the rest has been freed."""
    req.kv_committed_len = length
    _kv_info(req).kv_allocated_len = length


def remaining_tokens(req: Request) -> int:
    """Tokens that the request may still generate."""
    return max(req.sampling_params.max_new_tokens - len(req.output_ids), 0)


def output_bounds(reqs: Sequence[Request]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """`remaining_tokens` of many requests, and whether each will generate exactly as many; [N]."""
    sampling = [req.sampling_params for req in reqs]
    most = np.fromiter([params.max_new_tokens for params in sampling], np.int64, len(reqs))
    done = np.fromiter([len(req.output_ids) for req in reqs], np.int64, len(reqs))
    return (most - done).clip(min=0), np.fromiter([params.ignore_eos for params in sampling], np.bool_, len(reqs))


def custom_params(req: Request) -> object:
    """What the client sent as free-form parameters: any JSON value, of any size and depth. SGLang adds the request
    itself to an object."""
    return req.sampling_params.custom_params


def is_ending(req: Request) -> bool:
    """Whether the request has ended, or is to end with the reason that SGLang has given it."""
    return req.finished() or req.to_finish is not None


def metric_labels(scheduler: Any) -> dict[str, Any] | None:
    """Labels of SGLang's own scheduler metrics; None without `--enable-metrics`, or if another rank reports."""
    context = scheduler.metrics_collector_context
    return context.collector.labels if context.current_scheduler_metrics_enabled else None


def tensor_parallel_group() -> torch.distributed.ProcessGroup | None:
    """Process group of the tensor-parallel ranks; None when there is one rank."""
    from sglang.srt.distributed import get_tp_group

    group = get_tp_group()
    return group.device_group if group.world_size > 1 else None


def max_graph_batch(model_runner: Any) -> int:
    """Requests of the largest decode batch that gets a CUDA graph; 0 without graphs."""
    decode = model_runner.server_args.cuda_graph_config.decode
    has_graphs = model_runner.device != "cpu" and decode.backend != "disabled"
    return int(decode.max_bs or 0) if has_graphs else 0


def pool_tokens(configurator: Any, num_bytes: int) -> int:
    """Tokens of a pool of so many bytes, by SGLang's own rule; without the limit that the operator may have set."""
    from sglang.srt.model_executor.pool_configurator import create_memory_pool_configurator

    sizes = create_memory_pool_configurator(configurator).calculate_pool_sizes(num_bytes, configurator.page_size)
    return int(sizes.max_total_num_tokens)


def most_requests(configurator: Any, num_tokens: int) -> int:
    """Requests that SGLang will let run at a time on a pool of so many tokens."""
    return int(configurator.resolve_max_num_reqs(num_tokens))


def num_multiprocessors(configurator: Any) -> int:
    """Of the GPU that the configurator sizes a pool for; 0 on a CPU."""
    if configurator.device == "cpu":
        return 0
    return int(torch.cuda.get_device_properties(configurator.gpu_id).multi_processor_count)


def attention_layers(model: torch.nn.Module) -> list[Any]:
    """The model's `RadixAttention` modules, in layer order."""
    from sglang.srt.layers.radix_attention import RadixAttention

    return [module for module in model.modules() if isinstance(module, RadixAttention)]


def tree_slots(tree_cache: Any) -> torch.Tensor:
    """Slots owned by the radix tree, page after page; empty for a chunk cache."""
    if tree_cache.is_chunk_cache():
        return torch.empty(0, dtype=torch.int64)
    # SGLang's own walk recurses: a conversation of a thousand turns is a path of as many nodes
    values, nodes = [], [tree_cache.root_node]
    while nodes:
        children = nodes.pop().children.values()
        values += [child.value for child in children]
        nodes += children
    return torch.cat(values) if values else torch.empty(0, dtype=torch.int64)


def checks_every_step() -> bool:
    """Whether SGLang runs with its strict memory checks, which prove every page of every step and end the server."""
    from sglang.srt.environ import envs

    busy, pages = envs.SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY, envs.SGLANG_CHECK_KV_PAGE_INVARIANTS
    return bool(busy.get() or pages.get())


def active_requests(last_batch: Any, running_batch: Any) -> list[Request]:
    """Requests of the scheduler's batches, each once."""
    batches = [last_batch]
    if running_batch is not None and running_batch is not last_batch:
        batches.append(running_batch)
    return list(dict.fromkeys(req for batch in batches if batch is not None for req in batch.reqs))


def num_tokens(req: Request) -> int:
    """Tokens of prompt and output."""
    return len(req.origin_input_ids) + len(req.output_ids)


def cached_len(req: Request) -> int:
    """Leading tokens that already have slots: in the radix tree, or prefilled by an earlier chunk."""
    return len(req.prefix_indices)


def no_token() -> Any:
    """Admission's answer to a request that the pool cannot take now."""
    from sglang.srt.managers.schedule_policy import AddReqResult

    return AddReqResult.NO_TOKEN


def unfinished(reqs: Iterable[Request]) -> list[Request]:
    """Requests without those that have ended and hold nothing, but are not filtered out of their batch yet."""
    return [req for req in reqs if not req.finished()]


def room_for(adder: Any, req: Request, released: Iterable[Request] = ()) -> int:
    """Free and evictable tokens of the pool while the cached prefix of `req` is locked.

    released: requests whose cached prefixes are counted as unlocked.
    """
    with adder._lock_node(req.last_node):
        room = adder.token_to_kv_pool_allocator.available_size() + adder.tree_cache.evictable_size()
        return int(room) + _unlocked_tokens(released)


def _unlocked_tokens(reqs: Iterable[Request]) -> int:
    """Cached tokens that nobody but these requests holds."""
    locks: Counter[TreeNode] = Counter()
    for req in reqs:
        node = req.last_node
        while node is not None and node.parent is not None:
            locks[node] += 1
            node = node.parent
    return sum(len(node.key) for node, count in locks.items() if node.lock_ref == count)


def prefill_tokens(adder: Any, req: Request) -> int:
    """Tokens of the pool that SGLang asks for before it prefills `req` after what it has admitted; outputs excluded."""
    uncached = len(req.full_untruncated_fill_ids) - len(req.prefix_indices)
    return int(adder.rem_total_token_offset + uncached + adder.page_size)


def preemptible(stock: Callable[..., bool], adder: Any, req: Request, server_args: Any) -> list[Request]:
    """Running requests that SGLang may preempt for `req`, in its order."""
    candidates: list[Request] = []

    def count(candidate: Request) -> int:
        candidates.append(candidate)
        return 0

    # a need that no release meets: SGLang looks at every candidate and gives up
    with _preemption_budget(adder, count):
        stock(adder, req, server_args)
    return candidates


def preempt(stock: Callable[..., bool], adder: Any, req: Request, server_args: Any, victims: Sequence[Request]) -> None:
    """Let SGLang preempt the victims, which come first in its order, and requeue those that waited longest first.

    SGLang goes on to preempt for every later request of the pass, and collects victims in a set, whose order differs
    between tensor-parallel ranks.
    """
    with _preemption_budget(adder, lambda candidate: math.inf if candidate is victims[-1] else 0):
        stock(adder, req, server_args)
    adder.preempt_list[-len(victims) :] = reversed(victims)
    adder.running_batch.batch_is_full = False


@contextmanager
def _preemption_budget(adder: Any, freed: Callable[[Request], float]) -> Iterator[None]:
    """Within the block, preemption lacks more tokens than there are, and a candidate gives back what `freed` says."""
    offset = adder.rem_total_token_offset
    adder.rem_total_token_offset = NO_ROOM
    adder._get_running_request_total_token_offset = freed
    try:
        yield
    finally:
        del adder._get_running_request_total_token_offset
        adder.rem_total_token_offset = offset


def drop_output_reservation(adder: Any) -> None:
    """Make a fresh adder forget what it has set aside for the outputs of running requests."""
    adder.rem_total_token_offset = adder.cur_rem_token_offset


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


def cache_dense_prefix(cache: Callable[..., None], req: Request, tree_cache: Any, **kwargs: Any) -> None:
    """Insert at most the prompt of a retracted request into the radix tree; other requests as stock does.

    What the tree owned already stays owned and locked, also where it reaches into the output: another request with
    the same prompt may have left its first outputs there, and this one reads their slots until it is released.
    """
    start, end = req.extend_range
    dense_end = max(len(req.origin_input_ids), protected_len(req))
    if not req.retracted_stain or end <= dense_end:
        cache(req, tree_cache, **kwargs)
        return
    req.set_extend_range(min(start, dense_end), dense_end)
    try:
        cache(req, tree_cache, **kwargs)
    finally:
        req.set_extend_range(start, end)
    # the same shape as the partial last page of a prompt: indices known to the request, not owned by the tree
    row = tree_cache.req_to_token_pool.req_to_token[req.req_pool_idx]
    own = row[len(req.prefix_indices) : end].to(req.prefix_indices.dtype)
    req.prefix_indices = torch.cat((req.prefix_indices, own))


def first_kv_head(model_runner: Any, total_kv_heads: int, num_kv_heads: int) -> int:
    """Global index of this tensor-parallel rank's first KV head; ranks share heads when there are too few."""
    return int(model_runner.ps.tp_rank * num_kv_heads * total_kv_heads // max(total_kv_heads, model_runner.ps.tp_size))
