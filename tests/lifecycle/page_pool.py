"""A page allocator that proves ownership, and a planner over it, for tests of the lifecycle."""

from __future__ import annotations

import torch

from hardkv_sglang.config import HardKVConfig
from hardkv_sglang.lifecycle.planner import LifecyclePlanner
from hardkv_sglang.lifecycle.request_state import RequestState
from hardkv_sglang.memory_pool.integrity import check_ownership
from hardkv_sglang.memory_pool.layout import PoolLayout
from hardkv_sglang.memory_pool.resolved_config import ResolvedConfig

PAGE = 32
OPTIONS = HardKVConfig(
    recent_tokens=32, query_window=16, select_interval=32, condense_interval=64, max_events_per_step=2, min_tokens=8
)


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


def make_planner(options: HardKVConfig = OPTIONS) -> LifecyclePlanner:
    layout = PoolLayout(num_layers=2, num_kv_heads=2, head_dim=64, page_size=PAGE, num_slots=PAGE * 401)
    return LifecyclePlanner(ResolvedConfig(options, layout, 4, 0.125, 64, 4096))


def start(planner: LifecyclePlanner, pool: PagePool, row: int, prompt_len: int) -> RequestState:
    for seq_len in range(1, prompt_len + 1):
        assert pool.extend_row(row, seq_len)
    return planner.admit(row, prompt_len, prompt_len // PAGE * PAGE, prompt_len)
