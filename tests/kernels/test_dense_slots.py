"""Slots of the dense tiers against the reference, request by request."""

from __future__ import annotations

import itertools

import pytest
import torch

from hardkv_sglang.kernels import reference
from hardkv_sglang.kernels.dense_slots import plan_dense_slots

# (prefix_end, recent_start, seq_len); an uncompressed row has neither prefix nor window start
ROWS = [
    (0, 0, 1),
    (0, 0, 33),
    (32, 32, 40),
    (32, 64, 65),
    (96, 320, 353),
    (0, 32, 64),
    (1024, 2048, 2100),
    (0, 0, 3000),
]


SHARED = [0, 0, 32, 0, 64, 0, 1024, 2976]  # leading tokens of each row that are attended elsewhere


@pytest.mark.parametrize(
    "order",
    [
        [1],
        [1, 2, 3],
        [8, 0, 5, 7, 0, 4, 6, 1],
        [3, 0, 4, 1] * 10,
        pytest.param([3, 0, 4, 1] * 150, marks=pytest.mark.slow),
    ],
)
def test_dense_slots(make_case, order: list[int]) -> None:
    case = make_case(torch.zeros(1, 9, 1, dtype=torch.int64), torch.zeros(1, 9, 1, dtype=torch.int64))
    device, tables = case.k.device, case.tables
    req_to_token = torch.randint(32, 10000, (9, 3000), dtype=torch.int32).to(device)
    for row, (prefix_end, recent_start, _) in enumerate(ROWS, start=1):
        tables.prefix_end[row], tables.recent_start[row] = prefix_end, recent_start
    lens = [1, *(seq_len for _, _, seq_len in ROWS)]  # row 0 pads with length 1
    rows = torch.tensor(order, device=device)
    seq_lens = torch.tensor([lens[row] for row in order], device=device)
    shared = [[0, *SHARED][row] if i % 2 else 0 for i, row in enumerate(order)]
    shared_len = torch.tensor([*shared, 7], dtype=torch.int32, device=device)
    want = [
        reference.dense_slots(req_to_token, tables, row, lens[row], n) for row, n in zip(order, shared, strict=True)
    ]
    indptr = torch.full((len(order) + 1,), -1, dtype=torch.int32, device=device)
    slots = torch.full((sum(map(len, want)) + 5,), -1, dtype=torch.int32, device=device)
    plan_dense_slots(req_to_token, tables, rows, seq_lens, shared_len, indptr, slots)
    assert indptr.tolist() == [0, *itertools.accumulate(map(len, want))]
    assert torch.equal(slots[:-5], torch.cat(want))
    assert (slots[-5:] == -1).all()
