"""Proof that every token page of the server has exactly one owner, and that device tables agree with the host."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hardkv_sglang.engine import compat
from hardkv_sglang.engine.request import Request
from hardkv_sglang.lifecycle.request_state import RequestState
from hardkv_sglang.memory_pool.integrity import IntegrityError, check_ownership
from hardkv_sglang.memory_pool.layout import head_pages_needed
from hardkv_sglang.memory_pool.rank_memory import RankMemory


@dataclass(frozen=True)
class Audit:
    """Reads what planner, executor and SGLang wrote; writes nothing."""

    memory: RankMemory
    states: Mapping[Request, RequestState]  # by request
    is_parallel: bool  # page counts are the maximum over several ranks

    def check(self, reqs: list[Request], tree_cache: Any) -> None:
        """Prove that every token page has exactly one owner. Synchronises; for idle time and strict mode.

        Raises `IntegrityError`.
        """
        page_size = self.memory.layout.page_size
        allocator = tree_cache.token_to_kv_pool_allocator
        owners = {
            "free": compat.free_pages(allocator),
            "radix tree": compat.tree_slots(tree_cache)[::page_size] // page_size,
        }
        for req in reqs:
            if not compat.holds_kv(req):
                continue
            number = compat.row_of(req)
            row = self.memory.req_to_token[number]
            state = self.states.get(req)
            start, end = compat.protected_len(req), compat.allocated_len(req)
            if state is None or not state.is_compressed:
                owners[f"row {number}"] = row[start:end:page_size] // page_size
                continue
            own_prefix = row[start : state.prefix_end : page_size]
            dense = row[state.condensed_end : end : page_size]
            owners[f"row {number}"] = torch.cat((own_prefix, dense)) // page_size
            if state.num_condensed_pages:
                owners[f"condensed pages of row {number}"] = state.condensed_slots[::page_size] // page_size
                self._check_tables(state)
        check_ownership(owners, self.memory.layout.num_slots // page_size - 1)

    def _check_tables(self, state: RequestState) -> None:
        layout, tables = self.memory.layout, self.memory.tables
        counts = tables.num_condensed[:, state.row]
        head_pages = int(head_pages_needed(counts, layout.head_page_tokens).sum())
        held = state.num_condensed_pages
        # the maximum over the tensor-parallel ranks decides, so a rank may hold pages that it does not need
        if head_pages > held * layout.columns or (not self.is_parallel and head_pages <= (held - 1) * layout.columns):
            raise IntegrityError(f"row {state.row} holds {held} condensed pages for {head_pages} head pages")
        listed = tables.condensed_pages[state.row, :held].long().cpu()
        if not torch.equal(listed, state.condensed_slots[:: layout.page_size].cpu() // layout.page_size):
            raise IntegrityError(f"row {state.row}: the device table names other condensed pages than the host")
