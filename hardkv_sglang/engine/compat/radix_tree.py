"""What SGLang's radix tree keeps of requests, and what of theirs may enter it.

Read on 0.5.17 to 0.5.23:

- 0.5.17 and 0.5.18 have `RadixCache`, whose nodes are objects with a parent, and `ChunkCache` without a tree.
- Since 0.5.19 there is `UnifiedRadixCache` over a tree core, and a request's `last_node` is the id of a node. The core
  in Python resolves an id to a node. The core in Rust, the default since 0.5.21, does not; since 0.5.22 it names whole
  paths (`collect_path_info`). In between nobody can say which prefixes requests share.
- Since 0.5.20 a request keeps the receipt of its lock, since 0.5.22 the lock; there is no chunk cache any more then.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from hardkv_sglang.engine.request import Request

logger = logging.getLogger(__name__)

Path = list[tuple[int, int]]
"""Nodes from the root down, without it: (node id, tokens up to the end of the node)."""


def prefix_node(req: Request) -> int | None:
    """Id of the deepest node on the request's path; it changes once, when its own prefill is inserted."""
    node = req.last_node
    return None if node is None else int(getattr(node, "id", node))


def prefix_paths(reqs: Sequence[Request], tree_cache: Any) -> list[Path]:
    """The requests' paths in the radix tree; empty ones, and a warning once, where this SGLang does not name them."""
    core = getattr(tree_cache, "tree_core", None)
    if core is None:
        return [_path_to(req.last_node) for req in reqs]
    if hasattr(core, "collect_path_info"):
        paths = core.collect_path_info([req.last_node for req in reqs])
        return [[(int(node.node_id), int(node.path_end)) for node in path] for path in paths]
    try:
        return [_path_to(core.node_by_id(req.last_node)) for req in reqs]
    except NotImplementedError:
        _warn_of_unnamed_paths()
        return [[] for _ in reqs]


@cache
def _warn_of_unnamed_paths() -> None:
    """Once a process."""
    logger.warning(
        "HARD-KV: this SGLang's radix tree does not say which prefixes requests share, so each request reads its own. "
        "Start with SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND=python, or serve with another release"
    )


def _path_to(node: Any) -> Path:
    nodes = []
    while node is not None and node.parent is not None:
        nodes.append(node)
        node = node.parent
    path, end = [], 0
    for node in reversed(nodes):
        end += len(node.key)
        path.append((int(node.id), end))
    return path


@contextmanager
def unlocked(tree_cache: Any, reqs: Iterable[Request]) -> Iterator[None]:
    """Within the block, the tree counts as if these requests did not hold their prefixes. Nothing may be evicted in it.

    For full attention only: nothing but the node decides what a lock covers.
    """
    held = list(reqs)
    for req in held:
        _unlock(tree_cache, req)
    try:
        yield
    finally:
        for req in held:
            _lock(tree_cache, req)


def _unlock(tree_cache: Any, req: Any) -> None:
    if hasattr(tree_cache, "unlock"):
        tree_cache.unlock(req.lock)
    elif hasattr(req, "lock_receipt"):
        tree_cache.dec_lock_ref(req.last_node, req.lock_receipt)
    else:
        from sglang.srt.mem_cache.base_prefix_cache import DecLockRefParams

        tree_cache.dec_lock_ref(req.last_node, DecLockRefParams())


def _lock(tree_cache: Any, req: Any) -> None:
    if hasattr(tree_cache, "lock"):
        req.lock = tree_cache.lock(req.last_node)
        return
    receipt = tree_cache.inc_lock_ref(req.last_node)
    if hasattr(req, "lock_receipt"):
        req.lock_receipt = receipt.to_dec_params()


def tree_slots(tree_cache: Any) -> torch.Tensor:
    """Slots owned by the radix tree, page after page; empty without one. For audits: it may synchronise."""
    if not _has_tree(tree_cache):
        return torch.empty(0, dtype=torch.int64)
    core = getattr(tree_cache, "tree_core", None)
    if core is None:
        return _slots_below(tree_cache.root_node, lambda node: node.value)
    try:
        root = core.root_node
    except NotImplementedError:
        slots: torch.Tensor = core.all_values_flatten()
        return slots
    from sglang.srt.mem_cache.unified_cache.components import BASE_COMPONENT_TYPE

    return _slots_below(root, lambda node: node.component_data[BASE_COMPONENT_TYPE].value)


def _has_tree(tree_cache: Any) -> bool:
    if hasattr(tree_cache, "supports_prefix_sharing"):
        return bool(tree_cache.supports_prefix_sharing())
    return not tree_cache.is_chunk_cache()


def _slots_below(root: Any, slots_of: Callable[[Any], torch.Tensor | None]) -> torch.Tensor:
    # SGLang's own walk recurses: a conversation of a thousand turns is a path of as many nodes
    values, nodes = [], [root]
    while nodes:
        children = list(nodes.pop().children.values())
        values += [value for child in children if (value := slots_of(child)) is not None]
        nodes += children
    return torch.cat(values) if values else torch.empty(0, dtype=torch.int64)
