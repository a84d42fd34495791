"""Address arithmetic of the head-paged pool: token pages, head pages, rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PoolLayout:
    """Shapes of one rank's K (or V) storage `[num_layers, num_slots, num_kv_heads, head_dim]`.

    A token page is `page_size` consecutive slots in every layer and head. A head page is the part of a token
    page in one (layer, head) column; a token page holds `columns = num_layers * num_kv_heads` of them.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    num_slots: int  # includes the padding page 0

    @property
    def columns(self) -> int:
        """Head pages per token page."""
        return self.num_layers * self.num_kv_heads

    def page_floor(self, tokens: int) -> int:
        """Largest multiple of the page size that is at most `tokens`."""
        return tokens // self.page_size * self.page_size

    def page_ceil(self, tokens: int) -> int:
        """Smallest multiple of the page size that is at least `tokens`."""
        return -(-tokens // self.page_size) * self.page_size

    def dense_rows(self, layer: int, slots: torch.Tensor) -> torch.Tensor:
        """Storage rows of dense tokens.

        slots: [N] integer slot ids. Returns [num_kv_heads, N] int64 rows of the storage seen as
        `[num_layers * num_slots * num_kv_heads, head_dim]`.
        """
        heads = torch.arange(self.num_kv_heads, device=slots.device)
        return (layer * self.num_slots + slots.long())[None, :] * self.num_kv_heads + heads[:, None]

    def condensed_rows(self, pages: torch.Tensor, first_page: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Storage rows of condensed tokens.

        pages: [P] token pages of the request; first_page: [...] first head page of each list in the request's
        head-page sequence; index: [...] token index in its list. Returns int64 rows, shaped like `index`.
        Indices past a list's end are clamped to the request's last page: mask them afterwards.
        """
        sequence = first_page.long() + index.long() // self.page_size
        page = pages.long()[(sequence // self.columns).clamp_(max=pages.numel() - 1)]
        layer, head = sequence % self.columns // self.num_kv_heads, sequence % self.num_kv_heads
        slot = page * self.page_size + index.long() % self.page_size
        return (layer * self.num_slots + slot) * self.num_kv_heads + head


def head_pages_needed(counts: torch.Tensor, page_size: int) -> torch.Tensor:
    """Head pages of each list: `ceil(count / page_size)`; same shape and dtype as `counts`."""
    return (counts + (page_size - 1)) // page_size
