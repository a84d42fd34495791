"""A page allocator that proves ownership, for tests of the planner."""

from __future__ import annotations

import torch

from hardkv_sglang.lifecycle.request_state import RequestState
from hardkv_sglang.memory_pool.integrity import check_ownership

PAGE = 32


class PagePool:
    """Token pages of a pool and of the rows that requests hold, as `lifecycle.PageAllocator`."""

    def __init__(self, num_pages: int) -> None:
        self.free = list(range(1, num_pages + 1))
        self.rows: dict[int, dict[int, int]] = {}  # row -> page index in the row -> token page
        self.log: list[str] = []

    def alloc_pages(self, num_pages: int) -> list[int] | None:
        self.log.append("alloc")
        if num_pages > len(self.free):
            return None
        taken, self.free = self.free[:num_pages], self.free[num_pages:]
        return taken

    def free_pages(self, slots: list[int]) -> None:
        self.log.append("free")
        self.free += slots

    def free_row(self, row: int, start: int, end: int) -> None:
        self.log.append("free")
        assert start % PAGE == 0
        for index in range(start // PAGE, -(-end // PAGE)):
            self.free.append(self.rows[row].pop(index))

    def extend_row(self, row: int, seq_len: int) -> bool:
        """Make the row hold `seq_len` tokens; False if the pool is full."""
        pages = self.rows.setdefault(row, {})
        last = (seq_len - 1) // PAGE
        if last in pages:
            return True
        if not self.free:
            return False
        pages[last] = self.free.pop(0)
        return True

    def check(self, states: list[RequestState], num_pages: int) -> None:
        owners = {"free": torch.tensor(self.free, dtype=torch.int64)}
        for row, pages in self.rows.items():
            owners[f"row {row}"] = torch.tensor(list(pages.values()), dtype=torch.int64)
        for state in states:
            owners[f"condensed {state.row}"] = torch.tensor(state.condensed_slots or [], dtype=torch.int64)
        check_ownership(owners, num_pages)
