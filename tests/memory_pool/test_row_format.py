"""Where packed rows are: every byte of a head page has one owner at most, and no page reaches into another."""

from __future__ import annotations

import pytest
import torch

from hardkv_sglang.config import HardKVConfig
from hardkv_sglang.memory_pool.layout import PoolLayout, head_pages_needed
from hardkv_sglang.memory_pool.resolved_config import ResolvedConfig
from hardkv_sglang.memory_pool.row_format import SCALE_BYTES, RowFormat


@pytest.mark.parametrize(
    ("bits", "head_dim", "page_size", "tokens"),
    [
        (16, 128, 32, 32), (8, 128, 32, 62), (4, 128, 32, 120), (8, 64, 32, 60), (4, 64, 32, 112), (8, 256, 32, 62),
        (4, 256, 32, 124), (4, 128, 16, 60), (4, 64, 16, 56), (4, 128, 64, 240), (8, 80, 16, 30), (4, 16, 32, 84),
    ],
)  # fmt: skip
def test_a_head_page_holds_as_many_rows_as_fit(bits: int, head_dim: int, page_size: int, tokens: int) -> None:
    assert RowFormat(bits, head_dim, page_size, 2).tokens == tokens


@pytest.mark.parametrize("element_bytes", [2, 4])
@pytest.mark.parametrize("page_size", [16, 32, 64])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128, 256])
@pytest.mark.parametrize("bits", [8, 4])
def test_bytes_of_a_page_have_one_owner(bits: int, head_dim: int, page_size: int, element_bytes: int) -> None:
    layout = PoolLayout(2, 3, head_dim, page_size, 8 * page_size, bits, element_bytes)
    form, pages = layout.survivors, torch.tensor([5, 2, 7])
    first_page = torch.arange(layout.columns * len(pages))
    index = torch.arange(form.tokens)
    codes, scales = layout.packed_rows(
        pages, first_page[:, None].expand(-1, form.tokens), index.expand(len(first_page), -1)
    )
    first_bytes = (codes * form.row_bytes, form.row_bytes), (scales * SCALE_BYTES, SCALE_BYTES)
    owned = torch.cat([(start[..., None] + torch.arange(size)).flatten(1) for start, size in first_bytes], 1)
    assert owned.unique().numel() == owned.numel()
    # a head page is the rows that 16 bits would use, and what is left over is less than a row
    rows_of_pool = owned // form.chunk_bytes
    width = PoolLayout(2, 3, head_dim, page_size, 8 * page_size)
    for page, rows in zip(first_page, rows_of_pool, strict=True):
        own = width.condensed_rows(pages, page.expand(page_size), torch.arange(page_size))
        assert torch.isin(rows, own).all()
    assert page_size * form.chunk_bytes - owned.shape[1] < 2 * form.chunk_bytes


@pytest.mark.parametrize("bits", [8, 4])
def test_lists_go_on_from_page_to_page(bits: int) -> None:
    layout = PoolLayout(2, 2, 64, 32, 32 * 6, bits)
    tokens, pages = layout.head_page_tokens, torch.tensor([3, 1])
    index = torch.arange(2 * tokens + 1)
    whole = layout.packed_rows(pages, torch.tensor(2).expand_as(index), index)
    for i, part in enumerate(index.split(tokens)):
        piece = layout.packed_rows(pages, torch.tensor(2 + i).expand_as(part), part - i * tokens)
        for a, b in zip(whole, piece, strict=True):
            assert torch.equal(a[part], b)
    counts = torch.tensor([0, 1, tokens - 1, tokens, tokens + 1])
    assert head_pages_needed(counts, tokens).tolist() == [0, 1, 1, 1, 2]


def test_a_page_too_small_is_refused_with_the_option() -> None:
    with pytest.raises(ValueError, match=r"survivor_bits=8: a head page of 1 rows .*use survivor_bits=16.*--page-size"):
        PoolLayout(1, 1, 16, 1, 8, 8)
    with pytest.raises(ValueError, match="survivor_bits=4"):
        RowFormat(4, 3, 16, 2)


def test_sizes_derive_from_the_format() -> None:
    sizes = {}
    for bits in (16, 8, 4):
        layout = PoolLayout(2, 2, 128, 32, 3200, bits)
        cfg = ResolvedConfig(HardKVConfig(survivor_bits=bits), layout, 4, 0.1, 9, 8192)
        sizes[bits] = cfg.max_condensed_pages, cfg.pool_tokens(layout.head_page_tokens)
    assert sizes == {16: (128, 32), 8: (67, 32), 4: (35, 32)}
    with pytest.raises(ValueError, match="survivor_bits=16, but the layout is of 4 bits"):
        ResolvedConfig(HardKVConfig(), PoolLayout(2, 2, 128, 32, 3200, 4), 4, 0.1, 9, 8192)
