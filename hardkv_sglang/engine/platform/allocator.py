"""Paged allocation for machines without Triton."""

from __future__ import annotations

import torch
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator, alloc_extend_naive
from sglang.srt.utils import get_num_new_pages


class TorchPagedAllocator(PagedTokenToKVPoolAllocator):
    """SGLang's paged allocator with its two Triton kernels replaced by torch."""

    free_pages: torch.Tensor  # [free] int64

    def alloc_extend(
        self,
        prefix_lens: torch.Tensor,
        prefix_lens_cpu: torch.Tensor,
        seq_lens: torch.Tensor,
        seq_lens_cpu: torch.Tensor,
        last_loc: torch.Tensor,
        extend_num_tokens: int,
        num_new_pages: int | None = None,
    ) -> torch.Tensor | None:
        """Slots of the extended tokens, [extend_num_tokens] int64; None when the pool is full."""
        if num_new_pages is None:
            num_new_pages = get_num_new_pages(
                seq_lens=seq_lens_cpu, page_size=self.page_size, prefix_lens=prefix_lens_cpu
            )
        if num_new_pages > len(self.free_pages):
            return None
        slots = torch.empty((extend_num_tokens,), dtype=torch.int64, device=self.device)
        alloc_extend_naive(prefix_lens, seq_lens, last_loc, self.free_pages, slots, self.page_size, self.device)
        self.free_pages = self.free_pages[num_new_pages:]
        return slots

    def alloc_decode(
        self, seq_lens: torch.Tensor, seq_lens_cpu: torch.Tensor, last_loc: torch.Tensor
    ) -> torch.Tensor | None:
        """One slot per request, [bs] int64; None when the pool is full."""
        opens_page = (seq_lens - 1) % self.page_size == 0
        page_rank = torch.cumsum(opens_page, 0)
        num_new_pages = int(page_rank[-1])
        if num_new_pages > len(self.free_pages):
            return None
        slots = last_loc.long() + 1
        slots[opens_page] = self.free_pages[page_rank[opens_page] - 1] * self.page_size
        self.free_pages = self.free_pages[num_new_pages:]
        return slots
