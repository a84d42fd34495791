"""The condense kernels against their reference: bit-equal pools and equal tables."""

from __future__ import annotations

import pytest
import torch

from hardkv_sglang.kernels import reference, reference_condense
from hardkv_sglang.kernels.condense import condense
from hardkv_sglang.memory_pool.layout import head_pages_needed


def lengths(*rows: list[int]) -> torch.Tensor:
    """[L=2, R, H=2] list lengths from one list of four per row; row 0 stays empty."""
    return torch.tensor([[0, 0, 0, 0], *rows]).view(-1, 2, 2).transpose(0, 1).contiguous()


def assert_same(got, want, rows) -> None:
    """Pools equal bit by bit, and the published part of the tables."""
    for a, b in ((got.k, want.k), (got.v, want.v)):
        assert torch.equal(a.nan_to_num(nan=123.0), b.nan_to_num(nan=123.0))
    for name in ("num_condensed", "first_page", "num_sparse", "condensed_pages"):
        assert torch.equal(getattr(got.tables, name), getattr(want.tables, name)), name
    for row in rows:
        index = torch.arange(got.tables.condensed_keep.shape[-1], device=got.k.device)
        valid = index < want.tables.num_condensed[:, row, :, None]
        assert got.tables.condensed_keep[:, row][valid].all()
        energies = (tables.condensed_energy[:, row][valid] for tables in (got.tables, want.tables))
        assert torch.equal(*energies)


CASES = {
    "first-event": (lengths([0, 0, 0, 0], [0, 0, 0, 0]), lengths([1, 31, 32, 33], [0, 64, 7, 130])),
    "later-event": (lengths([33, 64, 0, 1], [600, 31, 32, 100]), lengths([5, 0, 40, 32], [0, 70, 1, 0])),
    "nothing-left": (lengths([0, 0, 0, 0], [1, 0, 0, 0]), lengths([0, 0, 0, 0], [0, 0, 0, 0])),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("page_size", [16, 32, 64], ids=lambda x: f"PS{x}")
@pytest.mark.parametrize("name", CASES)
def test_condense(make_case, name: str, page_size: int, dtype: torch.dtype) -> None:
    got = make_case(*CASES[name], page_size=page_size, dtype=dtype, spare_pages=30)
    want = got.copy()
    rows = torch.tensor([2, 1], device=got.k.device)
    P = min(10, got.tables.condensed_pages.shape[1])
    new_pages = got.free_pages[: 2 * P].view(2, P).contiguous()
    condense(got.k, got.v, got.layout, got.tables, got.req_to_token, rows, new_pages)
    for row, pages in zip(rows.tolist(), new_pages, strict=True):
        reference_condense.condense(want.k, want.v, want.layout, want.tables, want.req_to_token, row, pages)
    assert_same(got, want, rows)


def test_reference_keeps_attention(make_case) -> None:
    """With every token kept, moving the lists changes no attention result; twice gives the same as once."""
    case = make_case(*CASES["later-event"], spare_pages=40)
    case.tables.condensed_keep.fill_(True)
    q = torch.randn(case.cfg.num_q_heads, case.layout.head_dim, device=case.k.device)
    before = [case.oracle(q, layer, row) for layer in range(2) for row in (1, 2)]
    for event in range(2):
        for row in (1, 2):
            pages = case.free_pages[(2 * event + row - 1) * 10 :][:10]
            reference_condense.condense(case.k, case.v, case.layout, case.tables, case.req_to_token, row, pages)
    after = [case.oracle(q, layer, row) for layer in range(2) for row in (1, 2)]
    assert not case.tables.num_sparse.any()
    for (o_a, lse2_a), (o_b, lse2_b) in zip(before, after, strict=True):
        torch.testing.assert_close(o_a, o_b, rtol=0, atol=1e-12)
        torch.testing.assert_close(lse2_a, lse2_b, rtol=0, atol=1e-12)


def test_reference_by_loops(make_case) -> None:
    """The vectorised reference against a literal token loop."""
    case = make_case(*CASES["later-event"], spare_pages=20)
    layout, old = case.layout, case.copy()
    row, pages = 2, case.free_pages[:12]
    reference_condense.condense(case.k, case.v, layout, case.tables, case.req_to_token, row, pages)
    first = 0
    for layer in range(2):
        source, counts = reference.ragged_rows(layout, old.tables, old.req_to_token, layer, row)
        for head in range(2):
            cut = int(old.tables.num_condensed[layer, row, head])
            keep = old.tables.condensed_keep[layer, row, head]
            tokens = [i for i in range(int(counts[head])) if i >= cut or keep[i]]
            assert int(case.tables.first_page[layer, row, head]) == first
            assert int(case.tables.num_condensed[layer, row, head]) == len(tokens)
            index = torch.arange(len(tokens), device=pages.device)
            target = layout.condensed_rows(pages, torch.full_like(index, first), index)
            moved = case.k.view(-1, layout.head_dim)[target]
            assert torch.equal(moved, old.k.view(-1, layout.head_dim)[source[head][tokens]])
            remembered = old.tables.condensed_energy[layer, row, head]
            positions = old.tables.sparse_positions[layer, row, head].long()
            dense = old.tables.dense_energy[layer, row, head]
            expected = [remembered[i] if i < cut else dense[positions[i - cut] % len(dense)] for i in tokens]
            assert case.tables.condensed_energy[layer, row, head, : len(tokens)].tolist() == [
                float(x) for x in expected
            ]
            first += int(head_pages_needed(torch.tensor(len(tokens)), layout.page_size))


def test_reference_too_few_pages(make_case) -> None:
    case = make_case(*CASES["later-event"], spare_pages=20)
    case.tables.condensed_keep.fill_(True)
    before = case.copy()
    with pytest.raises(ValueError, match="do not fit"):
        reference_condense.condense(case.k, case.v, case.layout, case.tables, case.req_to_token, 2, case.free_pages[:1])
    assert torch.equal(case.tables.num_condensed, before.tables.num_condensed)
