"""Attention of a whole batch by PyTorch's CPU operators equals the torch definition, request by request."""

from __future__ import annotations

import pytest
import torch

from hardkv_sglang.kernels import EMPTY_LSE2, reference
from hardkv_sglang.kernels.cpu_attend import attend
from hardkv_sglang.kernels.cpu_rows import RequestLists, join_dense, join_lists

TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 1e-5}
# (prefix_end, recent_start, seq_len) of rows 1 to 4; the first has seen no event and has no lists
TIERS = [(0, 0, 70), (32, 96, 97), (0, 64, 200), (64, 500, 533)]
LISTS = [[0, 0], [0, 1], [31, 33], [700, 5]]


def make_rows(make_case, group: int, dtype: torch.dtype):
    """A case with these tiers, on the CPU; dense slots hold numbers, all other unused memory NaN."""
    num_condensed, num_sparse = torch.zeros(2, 5, 2, dtype=torch.int64), torch.zeros(2, 5, 2, dtype=torch.int64)
    num_condensed[:, 1:] = torch.tensor(LISTS)
    num_sparse[1, 3] = 20
    case = make_case(num_condensed, num_sparse, group=group, dtype=dtype, spare_pages=80, device="cpu")
    g = torch.Generator().manual_seed(group)
    for row, (prefix_end, recent_start, seq_len) in enumerate(TIERS, start=1):
        case.tables.prefix_end[row], case.tables.recent_start[row] = prefix_end, recent_start
        slots = (case.free_pages[20 * row - 20 :][:20, None] * 32 + torch.arange(32)).flatten()[:seq_len]
        positions = torch.cat((torch.arange(prefix_end), torch.arange(recent_start, seq_len)))
        case.req_to_token[row, positions] = slots[positions].int()
        for storage in (case.k, case.v):
            storage[:, slots[positions]] = torch.randn(2, len(positions), 2, 64, generator=g).to(dtype)
    return case


def joined(case, rows: list[int], group: int, kind: torch.dtype):
    """Dense tier and lists of a batch of these request rows."""
    slots = [reference.dense_slots(case.req_to_token, case.tables, row, TIERS[row - 1][2]) for row in rows]
    lists = [RequestLists.read(case.layout, case.tables, case.req_to_token, row) for row in rows]
    return join_dense(slots, case.layout, group, kind), join_lists(lists, case.layout, group, kind)


@pytest.mark.parametrize("rows", [[1], [2], [4, 1, 3, 2], [3, 4]], ids=str)
@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_cpu_attend(make_case, rows: list[int], group: int, dtype: torch.dtype) -> None:
    case = make_rows(make_case, group, dtype)
    kind, scale = torch.promote_types(dtype, torch.float32), case.cfg.softmax_scale
    dense, lists = joined(case, rows, group, kind)
    for layer in range(2):
        q = (torch.randn(len(rows), 2 * group, 64, generator=torch.Generator().manual_seed(layer)) * 3).to(dtype)
        one_layer = (x[layer].view(-1, 64) for x in (case.k, case.v))
        whole = (x.view(-1, 64) for x in (case.k, case.v))
        o, lse2 = reference.merge_states(
            attend(q.flatten(0, 1), *one_layer, dense, scale), attend(q.flatten(0, 1), *whole, lists[layer], scale)
        )
        assert o.dtype == lse2.dtype == kind
        for i, row in enumerate(rows):
            slots = reference.dense_slots(case.req_to_token, case.tables, row, TIERS[row - 1][2])
            k, v = case.k[layer].double(), case.v[layer].double()
            of_dense = reference.dense_decode(q[i].double(), k, v, slots, scale)
            expected = reference.merge_states(of_dense, case.oracle(q[i], layer, row))
            torch.testing.assert_close(o.view(q.shape)[i].double(), expected[0], rtol=0, atol=TOLERANCE[dtype])
            tolerance = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
            torch.testing.assert_close(lse2.view(q.shape[:2])[i].double(), expected[1], **tolerance)


def test_repeated_calls_have_the_same_bits(make_case) -> None:
    case = make_rows(make_case, 3, torch.float32)
    lists = joined(case, [3, 4], 3, torch.float32)[1][1]
    q, storage = torch.randn(12, 64), (case.k.view(-1, 64), case.v.view(-1, 64))
    first = attend(q, *storage, lists, 0.125)
    attend(torch.randn(12, 64), *storage, lists, 0.125)
    assert all(torch.equal(a, b) for a, b in zip(first, attend(q, *storage, lists, 0.125), strict=True))


def test_a_query_of_nan_is_forgotten(make_case) -> None:
    case = make_rows(make_case, 3, torch.float32)
    lists = joined(case, [3, 4], 3, torch.float32)[1][1]
    storage = case.k.view(-1, 64), case.v.view(-1, 64)
    attend(torch.full((12, 64), torch.nan), *storage, lists, 0.125)
    assert all(x.isfinite().all() for x in attend(torch.randn(12, 64), *storage, lists, 0.125))


def test_empty_lists(make_case) -> None:
    case = make_rows(make_case, 1, torch.float32)
    lists = joined(case, [1], 1, torch.float32)[1][0]
    o, lse2 = attend(torch.randn(2, 64), case.k.view(-1, 64), case.v.view(-1, 64), lists, 0.1)
    assert not o.any() and (lse2 == EMPTY_LSE2).all()


def test_rows_are_a_valid_sparse_matrix(make_case) -> None:
    dense, lists = joined(make_rows(make_case, 3, torch.float32), [1, 2, 3, 4], 3, torch.float32)
    for part in (dense, *lists):
        matrix = part.logits2
        assert int(part.indptr[-1]) == part.rows.numel() == part.query.numel()
        assert bool((part.rows >= 0).all()) and int(part.rows.max()) < matrix.shape[1]
        assert torch.equal(part.query.bincount(minlength=matrix.shape[0]), part.indptr.diff().long())


def test_joining_warns_of_nothing(make_case, recwarn) -> None:
    joined(make_rows(make_case, 1, torch.float32), [3], 1, torch.float32)
    assert not recwarn.list
