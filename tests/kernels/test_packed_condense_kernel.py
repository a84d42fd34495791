"""The condense kernels on packed survivors against their definition: bytes that move are equal, new ones nearly all."""

from __future__ import annotations

import pytest
import torch

from hardkv_sglang.kernels import reference_condense
from hardkv_sglang.kernels.condense import condense
from hardkv_sglang.kernels.packed_rows import PackedRows
from hardkv_sglang.kernels.reference_packed import load


def lengths(*rows: list[int]) -> torch.Tensor:
    """[L=2, R, H=2] list lengths from one list of four per row; row 0 stays empty."""
    return torch.tensor([[0, 0, 0, 0], *rows]).view(-1, 2, 2).transpose(0, 1).contiguous()


CASES = {
    "first-event": (lengths([0, 0, 0, 0], [0, 0, 0, 0]), lengths([1, 31, 112, 33], [0, 64, 7, 130])),
    "later-event": (lengths([113, 64, 0, 1], [600, 31, 32, 120]), lengths([5, 0, 40, 32], [0, 70, 1, 0])),
    "nothing-left": (lengths([0, 0, 0, 0], [1, 0, 0, 0]), lengths([0, 0, 0, 0], [0, 0, 0, 0])),
}


def stored(case, storage: torch.Tensor, layer: int, row: int, head: int) -> PackedRows:
    """Packed rows of a list."""
    tables = case.tables
    index = torch.arange(int(tables.num_condensed[layer, row, head]), device=storage.device)
    first = tables.first_page[layer, row, head].expand_as(index)
    return load(storage, case.layout, case.layout.packed_rows(tables.condensed_pages[row], first, index))


@pytest.mark.parametrize(
    ("head_dim", "page_size", "bits", "dtype"),
    [
        (64, 32, 4, torch.bfloat16),
        (64, 32, 8, torch.float32),
        (128, 64, 4, torch.float32),
        (256, 32, 8, torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", CASES)
def test_condense(make_case, name: str, head_dim: int, page_size: int, bits: int, dtype: torch.dtype) -> None:
    got = make_case(
        *CASES[name], page_size=page_size, dtype=dtype, spare_pages=30, survivor_bits=bits, head_dim=head_dim
    )
    want = got.copy()
    rows = torch.tensor([2, 1], device=got.k.device)
    P = min(10, got.tables.condensed_pages.shape[1])
    new_pages = got.free_pages[: 2 * P].view(2, P).contiguous()
    condense(got.k, got.v, got.layout, got.tables, got.req_to_token, rows, new_pages)
    for row, pages in zip(rows.tolist(), new_pages, strict=True):
        reference_condense.condense(want.k, want.v, want.layout, want.tables, want.req_to_token, row, pages)
    for table in ("num_condensed", "first_page", "num_sparse", "condensed_pages"):
        assert torch.equal(getattr(got.tables, table), getattr(want.tables, table)), table
    num_codes = num_equal = 0
    for layer, row, head in torch.cartesian_prod(torch.arange(2), rows.cpu(), torch.arange(2)).tolist():
        sparse = int(CASES[name][1][layer, row, head])
        for a, b in ((got.k, want.k), (got.v, want.v)):
            ours, theirs = stored(got, a, layer, row, head), stored(want, b, layer, row, head)
            moved = len(ours.codes) - sparse
            assert torch.equal(ours.codes[:moved], theirs.codes[:moved])
            # bytes, because NaN may be among what stands beside
            assert torch.equal(ours.scales[:moved].view(torch.int16), theirs.scales[:moved].view(torch.int16))
            torch.testing.assert_close(ours.scales, theirs.scales, rtol=2e-3, atol=2e-3)
            error = (ours.dequantise(bits, torch.float32) - theirs.dequantise(bits, torch.float32)).abs()
            assert (error <= 1.01 * theirs.scales[:, :1].float() + 4e-3).all()
            num_codes, num_equal = num_codes + ours.codes.numel(), num_equal + int((ours.codes == theirs.codes).sum())
    assert num_equal >= 0.98 * num_codes
    used = torch.ones(got.layout.num_slots, dtype=torch.bool)
    used[(new_pages.cpu().flatten()[:, None] * page_size + torch.arange(page_size)).flatten()] = False
    kind = torch.int32 if dtype == torch.float32 else torch.int16
    for a, b in ((got.k, want.k), (got.v, want.v)):
        assert torch.equal(a[:, used].view(kind), b[:, used].view(kind)), "outside of the new pages"


def test_too_few_pages_write_nowhere_else(make_case) -> None:
    case = make_case(*CASES["later-event"], spare_pages=20, survivor_bits=4)
    case.tables.condensed_keep.fill_(True)
    before, pages = case.copy(), case.free_pages[:1]
    condense(
        case.k,
        case.v,
        case.layout,
        case.tables,
        case.req_to_token,
        torch.tensor([2], device=case.k.device),
        pages[None],
    )
    outside = torch.ones(case.layout.num_slots, dtype=torch.bool)
    outside[int(pages) * 32 : int(pages) * 32 + 32] = False
    for a, b in ((case.k, before.k), (case.v, before.v)):
        assert torch.equal(a[:, outside].view(torch.int32), b[:, outside].view(torch.int32))
