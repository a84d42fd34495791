"""Which requests of a batch share a prefix, so that decode attention reads it once for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

MOST_GROUPS = 64
"""What saves less than its share among so many costs more than it saves."""

Path = Sequence[tuple[int, int]]
"""A request's nodes in the radix tree, from the root down: (node id, tokens up to the end of the node)."""


@dataclass(frozen=True)
class PrefixGroup:
    """Requests whose first `num_tokens` positions have the same slots."""

    num_tokens: int
    members: tuple[int, ...]  # batch entries, ascending

    @property
    def saved_tokens(self) -> int:
        """Reads of a token that one decode step saves when the prefix is read once."""
        return (len(self.members) - 1) * self.num_tokens


def group_by_prefix(paths: Sequence[Path], min_saved_tokens: int, max_tokens: int) -> tuple[PrefixGroup, ...]:
    """Disjoint groups that together save at least `min_saved_tokens` reads of a token per step, or none.

    paths: by batch entry; max_tokens: most tokens of all groups' prefixes together. A group saves a `MOST_GROUPS`th
    of `min_saved_tokens` at least. One prefix per request: where prefixes nest, the one that saves most goes first.
    Linear in the nodes of all paths, but for sorting those worth a group.
    """
    least = -(-min_saved_tokens // MOST_GROUPS)
    members: dict[int, list[int]] = {}
    ends: dict[int, int] = {}
    for entry, path in enumerate(paths):
        for node, end in path:
            members.setdefault(node, []).append(entry)
            ends[node] = end
    worthy = [PrefixGroup(ends[node], tuple(entries)) for node, entries in members.items()]
    worthy = [group for group in worthy if len(group.members) > 1 and group.saved_tokens >= least]
    chosen: list[PrefixGroup] = []
    grouped: set[int] = set()
    for group in sorted(worthy, key=lambda group: group.saved_tokens, reverse=True):
        left = PrefixGroup(group.num_tokens, tuple(entry for entry in group.members if entry not in grouped))
        if len(left.members) > 1 and left.saved_tokens >= least and left.num_tokens <= max_tokens:
            chosen.append(left)
            grouped.update(left.members)
            max_tokens -= left.num_tokens
    return tuple(chosen) if sum(group.saved_tokens for group in chosen) >= min_saved_tokens else ()


class PrefixGrouper:
    """Groups of the running batch, looked for again when its requests change, or their places in the radix tree."""

    def __init__(self, min_saved_tokens: int | None, max_tokens: int) -> None:
        """See `group_by_prefix`; min_saved_tokens: None finds no groups."""
        self.min_saved_tokens = min_saved_tokens
        self.max_tokens = max_tokens
        self.groups: tuple[PrefixGroup, ...] = ()
        self._nodes: Sequence[int | None] = ()

    def group(self, nodes: Sequence[int | None], find_paths: Callable[[], Sequence[Path]]) -> tuple[PrefixGroup, ...]:
        """Groups of a batch; nodes: the last one on each request's path, None without one.

        With the overlap scheduler a request's first decode step is launched before its prefill is in the tree.
        """
        if self.min_saved_tokens is not None and nodes != self._nodes:
            self._nodes = nodes
            self.groups = group_by_prefix(find_paths(), self.min_saved_tokens, self.max_tokens)
        return self.groups

    def describe(self) -> list[dict[str, Any]]:
        """JSON-serialisable groups of the last decode batch."""
        return [{"tokens": group.num_tokens, "requests": len(group.members)} for group in self.groups]
