"""What SGLang's radix tree keeps of requests, and what of theirs may enter it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch

from hardkv_sglang.engine.compat.requests import protected_len, row_of
from hardkv_sglang.engine.request import Request, TreeNode


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


def unlocked_tokens(reqs: Iterable[Request]) -> int:
    """Cached tokens that nobody but these requests holds."""
    locks: Counter[TreeNode] = Counter()
    for req in reqs:
        node = req.last_node
        while node is not None and node.parent is not None:
            locks[node] += 1
            node = node.parent
    return sum(len(node.key) for node, count in locks.items() if node.lock_ref == count)


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


def cached_len(req: Request) -> int:
    """Leading tokens that already have slots: in the radix tree, or prefilled by an earlier chunk."""
    return len(req.prefix_indices)


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
    row = tree_cache.req_to_token_pool.req_to_token[row_of(req)]
    own = row[len(req.prefix_indices) : end].to(req.prefix_indices.dtype)
    req.prefix_indices = torch.cat((req.prefix_indices, own))
