"""How a head page holds survivors: as rows of the pool's own type, or packed into fewer bits.

A head page is `page_size` rows of the pool, scattered, each a chunk of `head_dim * element_bytes` bytes. Packed, its
first chunks hold the codes of whole rows, and the last ones four bytes for each row: scale and zero, float16 each.
"""

from __future__ import annotations

from dataclasses import dataclass

SCALE_BYTES = 4  # of a row: scale and zero, float16 each
POOL_BITS = 16  # as the pool stores it, whatever its type


@dataclass(frozen=True)
class RowFormat:
    """Where in a head page a row's bytes are.

    Raises `ValueError` when a head page would hold no more packed rows than rows of the pool.
    """

    bits: int
    head_dim: int
    page_size: int
    element_bytes: int  # of the pool's type

    def __post_init__(self) -> None:
        if self.is_packed and (self.head_dim * self.bits % 8 or self.tokens <= self.page_size):
            raise ValueError(
                f"survivor_bits={self.bits}: a head page of {self.page_size} rows of {self.head_dim} elements holds no "
                "more rows in fewer bits; use survivor_bits=16, or a larger --page-size"
            )

    @property
    def is_packed(self) -> bool:
        """Whether rows are codes with scale and zero."""
        return self.bits < POOL_BITS

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one row of the pool."""
        return self.head_dim * self.element_bytes

    @property
    def row_bytes(self) -> int:
        """Bytes of a row's codes."""
        return self.head_dim * self.bits // 8 if self.is_packed else self.chunk_bytes

    @property
    def rows_per_chunk(self) -> int:
        """Packed rows whose codes fill a chunk."""
        return self.chunk_bytes // self.row_bytes

    @property
    def scales_per_chunk(self) -> int:
        """Packed rows whose scales and zeros fill a chunk."""
        return self.chunk_bytes // SCALE_BYTES

    @property
    def tokens(self) -> int:
        """Rows of a head page: as many as fit."""
        if not self.is_packed:
            return self.page_size
        rows = self.page_size * self.chunk_bytes // (self.row_bytes + SCALE_BYTES)
        while self._code_chunks(rows) + self._scale_chunks(rows) > self.page_size:
            rows -= 1
        return rows

    @property
    def first_scale_chunk(self) -> int:
        """The first chunk of scales and zeros."""
        return self._code_chunks(self.tokens)

    def _code_chunks(self, rows: int) -> int:
        return -(-rows // self.rows_per_chunk)

    def _scale_chunks(self, rows: int) -> int:
        return -(-rows // self.scales_per_chunk)
