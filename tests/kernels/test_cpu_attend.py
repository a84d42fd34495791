"""Attention over all tiers at once by PyTorch's CPU kernel equals the torch definition, tier by tier."""

from __future__ import annotations

import pytest
import torch

from hardkv_sglang.kernels import reference
from hardkv_sglang.kernels.cpu_attend import LOG2_E, SPARE_TOKENS, GatherBuffer, RequestRows, attend

TOLERANCE = {torch.float64: 1e-11, torch.float32: 5e-6, torch.bfloat16: 5e-6}
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


@pytest.mark.parametrize("row", [1, 2, 3, 4])
@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_cpu_attend(make_case, row: int, group: int, dtype: torch.dtype) -> None:
    case = make_rows(make_case, group, dtype)
    kind, seq_len = torch.promote_types(dtype, torch.float32), TIERS[row - 1][2]
    known = seq_len - 3 if row != 2 else seq_len
    found = RequestRows.find(case.layout, case.tables, case.req_to_token, row, known, kind)
    assert found.grow(case.layout, case.req_to_token[row, known:seq_len])
    assert found.seq_len == seq_len
    slots, buffer = reference.dense_slots(case.req_to_token, case.tables, row, seq_len), GatherBuffer(case.k)
    for layer, live in enumerate(found.layers()):
        q = (torch.randn(2 * group, 64, generator=torch.Generator().manual_seed(row)) * 3).to(dtype)
        o, lse = attend(q, case.k, case.v, live, case.cfg.softmax_scale, buffer)
        dense = (q.double(), case.k[layer].double(), case.v[layer].double(), slots, case.cfg.softmax_scale)
        expected = reference.merge_states(reference.dense_decode(*dense), case.oracle(q, layer, row))
        assert o.dtype == lse.dtype == kind
        torch.testing.assert_close(o.view(q.shape).double(), expected[0], rtol=0, atol=TOLERANCE[dtype])
        lse2 = lse.flatten().double() * LOG2_E
        torch.testing.assert_close(lse2, expected[1], rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_rows_without_room_are_found_anew(make_case) -> None:
    case = make_rows(make_case, 1, torch.float32)
    found = RequestRows.find(case.layout, case.tables, case.req_to_token, 3, 150, torch.float32)
    assert not found.grow(case.layout, torch.zeros(SPARE_TOKENS + 1, dtype=torch.int32))
    assert found.seq_len == 150
    assert found.grow(case.layout, torch.zeros(SPARE_TOKENS, dtype=torch.int32))


def test_lists_are_padded_only_to_the_longest_of_their_layer(make_case) -> None:
    case = make_rows(make_case, 1, torch.float32)
    found = RequestRows.find(case.layout, case.tables, case.req_to_token, 3, 200, torch.float32)
    sizes = [live.rows.shape[0] for live in found.layers()]
    assert sizes == [max(LISTS[2]) + 136, max(LISTS[2]) + 20 + 136]
