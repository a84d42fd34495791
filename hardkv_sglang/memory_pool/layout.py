"""Address arithmetic of the head-paged pool: token pages, head pages, rows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from hardkv_sglang.memory_pool.row_format import POOL_BITS, RowFormat


@dataclass(frozen=True)
class PoolLayout:
    """Shapes of one rank's K (or V) storage `[num_layers, num_slots, num_kv_heads, head_dim]`.

    A token page is `page_size` consecutive slots in every layer and head. A head page is the part of a token
    page in one (layer, head) column; a token page holds `columns = num_layers * num_kv_heads` of them.

    Raises `ValueError` for `survivor_bits` that head pages of this size cannot hold.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    num_slots: int  # includes the padding page 0
    survivor_bits: int = POOL_BITS  # of a condensed element
    element_bytes: int = 2  # of the pool's type

    def __post_init__(self) -> None:
        self.survivors  # noqa: B018 - refuses what does not fit

    @cached_property
    def survivors(self) -> RowFormat:
        """How head pages hold condensed rows."""
        return RowFormat(self.survivor_bits, self.head_dim, self.page_size, self.element_bytes)

    @cached_property
    def head_page_tokens(self) -> int:
        """Condensed tokens of a head page."""
        return self.survivors.tokens

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
        """Storage rows of condensed tokens, where they are rows of the pool.

        pages: [P] token pages of the request; first_page: [...] first head page of each list in the request's
        head-page sequence; index: [...] token index in its list. Returns int64 rows, shaped like `index`.
        Indices past a list's end are clamped to the request's last page: mask them afterwards.
        """
        return self._chunk(pages, first_page, index, index.long() % self.page_size)

    def packed_rows(
        self, pages: torch.Tensor, first_page: torch.Tensor, index: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Where packed tokens are; arguments as for `condensed_rows`.

        Returns, int64 and shaped like `index`, the place of their codes in the storage seen as rows of
        `survivors.row_bytes` bytes, and that of their scale and zero in the storage seen as pairs of float16.
        """
        form, within = self.survivors, index.long() % self.head_page_tokens
        codes = self._chunk(pages, first_page, index, within // form.rows_per_chunk)
        scales = self._chunk(pages, first_page, index, form.first_scale_chunk + within // form.scales_per_chunk)
        return (
            codes * form.rows_per_chunk + within % form.rows_per_chunk,
            scales * form.scales_per_chunk + within % form.scales_per_chunk,
        )

    def _chunk(
        self, pages: torch.Tensor, first_page: torch.Tensor, index: torch.Tensor, chunk: torch.Tensor
    ) -> torch.Tensor:
        """Storage row of a chunk of the head page that holds a token."""
        sequence = first_page.long() + index.long() // self.head_page_tokens
        page = pages.long()[(sequence // self.columns).clamp_(max=pages.numel() - 1)]
        layer, head = sequence % self.columns // self.num_kv_heads, sequence % self.num_kv_heads
        return (layer * self.num_slots + page * self.page_size + chunk) * self.num_kv_heads + head


def head_pages_needed(counts: torch.Tensor, head_page_tokens: int) -> torch.Tensor:
    """Head pages of each list: `ceil(count / head_page_tokens)`; same shape and dtype as `counts`."""
    return (counts + (head_page_tokens - 1)) // head_page_tokens
