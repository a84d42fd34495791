"""The observation ring records exactly the queries that it should; `test_shared_prefix.py` has the other half."""

from __future__ import annotations

import pytest
import torch

from hardkv_sglang.kernels.finish import finish_layer


@pytest.mark.parametrize("group", [1, 3, 8])
def test_queries_are_recorded(make_case, group: int) -> None:
    none = torch.zeros(2, 5, 2, dtype=torch.int64)
    case = make_case(none, none, group=group)
    tables, device, window = case.tables, case.k.device, case.tables.query_ring.shape[2]
    tables.query_ring.fill_(torch.nan)
    tables.lse2_ring.fill_(torch.nan)
    tables.ring_slot[:] = torch.tensor([-1, -1, 0, -1, 3])
    rows = torch.tensor([4, 0, 1, 2, 3, 0], device=device)
    # rows 0 (padding), 1 and 3 have no slot
    seq_lens = torch.tensor([7, 1, 100, 101, 501, 1], device=device)
    q = torch.randn(6, case.cfg.num_q_heads, case.layout.head_dim).to(device)
    lse2 = torch.randn(6, case.cfg.num_q_heads).to(device)
    o = torch.randn_like(q)
    before = o.clone(), lse2.clone()
    finish_layer(tables, None, 1, rows, seq_lens, q, (o, lse2))
    assert torch.equal(o, before[0])
    assert torch.equal(lse2, before[1])
    assert torch.equal(tables.query_ring[1, 3, 6], q[0])
    assert torch.equal(tables.lse2_ring[1, 3, 6], lse2[0])
    assert torch.equal(tables.query_ring[1, 0, 100 % window], q[3])
    assert torch.equal(tables.lse2_ring[1, 0, 100 % window], lse2[3])
    written = ~tables.lse2_ring.isnan()
    assert int(written.sum()) == 2 * case.cfg.num_q_heads
    assert int((~tables.query_ring.isnan()).sum()) == 2 * case.cfg.num_q_heads * case.layout.head_dim
