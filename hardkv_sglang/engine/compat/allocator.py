"""Pages of SGLang's pool: taking, giving back, counting.

Read on 0.5.17 to 0.5.23. Since 0.5.20 freed pages wait in a staging area of the allocator's own, and only
`get_all_free_pages` names them all.
"""

from __future__ import annotations

from typing import Any

import torch


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


def free_pages(allocator: Any) -> torch.Tensor:
    """Pages that nobody owns, in any order. For audits: it may synchronise."""
    if hasattr(allocator, "get_all_free_pages"):
        pages: torch.Tensor = allocator.get_all_free_pages()
        return pages
    return torch.cat((allocator.free_pages, allocator.release_pages))
