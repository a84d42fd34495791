"""Condense events of packed survivors: who survives, and that their bytes never change again."""

from __future__ import annotations

import pytest
import torch

from hardkv_sglang.kernels import reference_condense
from hardkv_sglang.kernels.packed_rows import PackedRows, key_statistics, prepare_keys
from hardkv_sglang.kernels.reference_packed import load, read_lists
from hardkv_sglang.memory_pool.layout import head_pages_needed
from hardkv_sglang.memory_pool.row_format import RowFormat

BITS = pytest.mark.parametrize("bits", [8, 4])
SPAN = 64  # positions that hold the sparse tokens of a case, from 100 on


def make(make_case, bits: int, condensed: list[list[int]], sparse: list[list[int]], dtype=torch.bfloat16):
    """A case with one request, row 1, whose lists have these lengths ([L][H])."""
    counts = [torch.zeros(2, 2, 2, dtype=torch.int64) for _ in range(2)]
    counts[0][:, 1], counts[1][:, 1] = torch.tensor(condensed), torch.tensor(sparse)
    return make_case(*counts, dtype=dtype, survivor_bits=bits, spare_pages=40, device="cpu")


def stored(case, row: int) -> list[list[tuple[PackedRows, PackedRows]]]:
    """Packed keys and values of every list."""
    tables, layout, lists = case.tables, case.layout, []
    for layer in range(2):
        lists.append([])
        for head in range(2):
            index = torch.arange(int(tables.num_condensed[layer, row, head]))
            first = tables.first_page[layer, row, head].expand_as(index)
            places = layout.packed_rows(tables.condensed_pages[row], first, index)
            lists[-1].append((load(case.k, layout, places), load(case.v, layout, places)))
    return lists


def condense(case, first_page: int, is_first: bool = False) -> torch.Tensor:
    """Condense row 1 into free pages from the given one on; returns them."""
    pages = case.free_pages[first_page:][: case.tables.condensed_pages.shape[1]]
    reference_condense.condense(case.k, case.v, case.layout, case.tables, case.req_to_token, 1, pages, is_first)
    return pages


def awkward(bits: int) -> list[tuple[list[list[int]], list[list[int]]]]:
    t = RowFormat(bits, 64, 32, 2).tokens
    return [
        ([[0, 0], [0, 0]], [[0, 1], [31, 33]]),
        ([[1, t - 1], [t, t + 1]], [[0, 0], [0, 0]]),
        ([[t - 1, 0], [t + 1, 2 * t]], [[1, 64], [0, 3]]),
        ([[3 * t + 5, 1], [0, 2]], [[60, 0], [17, 64]]),
    ]


@BITS
@pytest.mark.parametrize("number", range(4))
def test_bytes_of_condensed_tokens_never_change(make_case, bits: int, number: int) -> None:
    case = make(make_case, bits, *awkward(bits)[number])
    layout, tables = case.layout, case.tables
    tables.condensed_keep[:, 1, :, 1::3] = False
    for event in range(3):
        before, old = stored(case, 1), case.copy()
        pages = condense(case, 12 * event)
        first = 0
        for layer, head in ((0, 0), (0, 1), (1, 0), (1, 1)):
            was = int(old.tables.num_condensed[layer, 1, head])
            kept = old.tables.condensed_keep[layer, 1, head, :was].nonzero().flatten()
            sparse = int(old.tables.num_sparse[layer, 1, head])
            now = len(kept) + sparse
            assert int(tables.num_condensed[layer, 1, head]) == now
            assert int(tables.first_page[layer, 1, head]) == first
            first += int(head_pages_needed(torch.tensor(now), layout.head_page_tokens))
            positions = old.tables.sparse_positions[layer, 1, head, :sparse].long()
            slots = old.req_to_token[1, positions].long()
            offset, scale = tables.key_offset[layer, 1, head], tables.key_scale[layer, 1, head]
            fresh = [
                PackedRows.quantise(prepare_keys(old.k[layer, slots, head], offset, scale), bits),
                PackedRows.quantise(old.v[layer, slots, head], bits),
            ]
            for storage in range(2):
                held, past = stored(case, 1)[layer][head][storage], before[layer][head][storage]
                for name in ("codes", "scales"):
                    bytes_of = [x.view(torch.uint8) for x in (getattr(past, name)[kept], getattr(fresh[storage], name))]
                    assert torch.equal(getattr(held, name).view(torch.uint8), torch.cat(bytes_of))
        check_untouched(case, old, pages)
        # what the next event drops
        tables.condensed_keep[:, 1] = torch.rand(tables.condensed_keep[:, 1].shape) < 0.7
    assert not tables.num_sparse.any()


def check_untouched(case, old, pages: torch.Tensor) -> None:
    """Nothing outside the new pages is written, sources included."""
    slots = torch.ones(case.layout.num_slots, dtype=torch.bool)
    slots[(pages[:, None] * 32 + torch.arange(32)).flatten()] = False
    for new, past in ((case.k, old.k), (case.v, old.v)):
        assert torch.equal(new[:, slots].view(torch.int16), past[:, slots].view(torch.int16))
    assert torch.equal(case.tables.condensed_pages[1, : len(pages)].long(), pages)


@BITS
def test_the_first_event_takes_offsets_and_scales(make_case, bits: int) -> None:
    case = make(make_case, bits, [[0, 0], [0, 0]], [[40, 3], [0, 64]])
    case.tables.recent_start[1] = 100 + SPAN
    slots = (case.free_pages[30:36, None] * 32 + torch.arange(32)).flatten()[:164]
    values = torch.randn(2, 164, 2, 64, generator=torch.Generator().manual_seed(bits)) * 3 + 11
    case.req_to_token[1, :100] = slots[:100].int()
    case.k[:, slots[:100]] = values[:, :100].bfloat16()
    case.k[:, case.req_to_token[1, 100:164].long()] = values[:, 100:].bfloat16()
    condense(case, 0, is_first=True)
    expected = key_statistics(values.bfloat16().transpose(1, 2))
    torch.testing.assert_close(case.tables.key_offset[:, 1], expected[0])
    torch.testing.assert_close(case.tables.key_scale[:, 1], expected[1])
    offset = case.tables.key_offset.clone()
    case.k.mul_(2)
    condense(case, 12)
    assert torch.equal(case.tables.key_offset, offset)


@BITS
def test_rounding_in_the_pool_is_rounding_of_the_rows(make_case, bits: int) -> None:
    """What is read of condensed tokens is what was there, up to half a step of each row's own."""
    case = make(make_case, bits, [[0, 0], [0, 0]], [[40, 3], [1, 64]], torch.float32)
    case.tables.key_offset.zero_()
    old = case.copy()
    condense(case, 0)
    index = torch.arange(64).expand(2, 2, -1)
    keys, values = read_lists(case.k, case.v, case.layout, case.tables, slice(0, 2), 1, index)
    for layer, head in ((0, 0), (0, 1), (1, 0), (1, 1)):
        n = int(old.tables.num_sparse[layer, 1, head])
        slots = old.req_to_token[1, old.tables.sparse_positions[layer, 1, head, :n].long()].long()
        step = (old.v[layer, slots, head].amax(1) - old.v[layer, slots, head].amin(1)) / (2**bits - 1)
        error = (values[layer, head, :n] - old.v[layer, slots, head]).abs().amax(1)
        assert (error <= 0.51 * step + 5e-3).all()
        k = old.k[layer, slots, head]
        assert (keys[layer, head, :n] - k).norm() < (0.02 if bits == 8 else 0.3) * k.norm()
        assert not keys[layer, head, n:].any()


@BITS
def test_survivors_that_do_not_fit_are_refused(make_case, bits: int) -> None:
    case = make(make_case, bits, *awkward(bits)[3])
    case.tables.condensed_keep.fill_(True)
    before = case.copy()
    with pytest.raises(ValueError, match="do not fit"):
        reference_condense.condense(case.k, case.v, case.layout, case.tables, case.req_to_token, 1, case.free_pages[:1])
    assert torch.equal(case.tables.num_condensed, before.tables.num_condensed)
