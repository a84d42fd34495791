"""Pool storage and page allocation of one request, without SGLang."""

from __future__ import annotations

import torch

from hardkv_sglang.memory_pool.integrity import check_ownership
from hardkv_sglang.memory_pool.layout import PoolLayout

ROW = 1
"""The request's row; row 0 pads, as in SGLang."""


class PagePool:
    """K and V storage, the request's row of slots, and a free list: a `lifecycle.PageAllocator`."""

    def __init__(
        self,
        layout: PoolLayout,
        max_len: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        size = (layout.num_layers, layout.num_slots, layout.num_kv_heads, layout.head_dim)
        self.layout = layout
        self.k_storage, self.v_storage = (torch.zeros(size, dtype=dtype, device=device) for _ in range(2))
        self.req_to_token = torch.zeros((ROW + 1, layout.page_ceil(max_len)), dtype=torch.int32, device=device)
        self.free_list = list(range(layout.num_slots // layout.page_size - 1, 0, -1))
        self.num_pages = len(self.free_list)

    @property
    def used_pages(self) -> int:
        """Token pages that the request holds."""
        return self.num_pages - len(self.free_list)

    def alloc_pages(self, num_pages: int) -> torch.Tensor | None:
        """Slots [num_pages * page_size] int64, or None when too few pages are free."""
        if num_pages > len(self.free_list):
            return None
        pages = torch.tensor([self.free_list.pop() for _ in range(num_pages)], dtype=torch.int64)
        slots = (pages[:, None] * self.layout.page_size + torch.arange(self.layout.page_size)).flatten()
        return slots.to(self.req_to_token.device)

    def free_pages(self, slots: torch.Tensor) -> None:
        """Return whole token pages."""
        self.free_list += (slots[:: self.layout.page_size] // self.layout.page_size).tolist()

    def free_row(self, row: int, start: int, end: int) -> None:
        """Return the token pages behind positions `[start, end)`."""
        self.free_pages(self.req_to_token[row, start:end].clone())

    def extend_row(self, start: int, end: int) -> None:
        """Give positions `[start, end)` slots; a page is opened at its first position."""
        first, last = self.layout.page_ceil(start), self.layout.page_ceil(end)
        if first == last:
            return
        slots = self.alloc_pages((last - first) // self.layout.page_size)
        if slots is None:
            raise MemoryError(f"the pool of {self.num_pages} pages is too small for position {end}")
        self.req_to_token[ROW, first:last] = slots.to(torch.int32)

    def check(self, held: dict[str, torch.Tensor]) -> None:
        """Prove that every page has one owner; held: slots by owner."""
        size = self.layout.page_size
        owners = {name: slots[::size].long().cpu() // size for name, slots in held.items()}
        check_ownership({"free": torch.tensor(self.free_list, dtype=torch.int64), **owners}, self.num_pages)
