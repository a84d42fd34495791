"""Attention over all tiers at once by PyTorch's CPU kernel equals the torch definition, tier by tier."""

from __future__ import annotations

import pytest
import torch

from hardkv_sglang.kernels import reference
from hardkv_sglang.kernels.cpu_attend import add_dense, attend, find_lists, no_lists

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
    lists = find_lists(case.layout, case.tables, case.req_to_token, row, kind)
    if row == 1:
        lists = no_lists(case.layout, kind)
    slots = reference.dense_slots(case.req_to_token, case.tables, row, seq_len)
    live = add_dense(lists, case.layout, slots)
    for layer in range(2):
        q = (torch.randn(2 * group, 64, generator=torch.Generator().manual_seed(row)) * 3).to(dtype)
        o, lse2 = attend(q, case.k, case.v, live[layer], case.cfg.softmax_scale)
        dense = (q.double(), case.k[layer].double(), case.v[layer].double(), slots, case.cfg.softmax_scale)
        expected = reference.merge_states(reference.dense_decode(*dense), case.oracle(q, layer, row))
        assert o.dtype == lse2.dtype == kind
        torch.testing.assert_close(o.double(), expected[0], rtol=0, atol=TOLERANCE[dtype])
        torch.testing.assert_close(lse2.double(), expected[1], rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
