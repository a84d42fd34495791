"""Restored candidates and key statistics of packed survivors against their definitions in torch."""

from __future__ import annotations

import pytest
import torch

from hardkv_sglang.kernels import reference_packed
from hardkv_sglang.kernels.list_candidates import list_candidates
from hardkv_sglang.kernels.restore import restore_candidates, take_statistics
from hardkv_sglang.lifecycle.request_state import RequestState
from hardkv_sglang.lifecycle.step_plan import SelectOp
from hardkv_sglang.memory_pool.rank_memory import RankMemory

TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-2}
ROW, SPAN = 2, 96


def memory_of(case) -> RankMemory:
    return RankMemory(case.cfg, case.tables, case.k, case.v, case.req_to_token)


def select_op(bound: int) -> SelectOp:
    """Of a request whose span of `SPAN` tokens follows a prefix of 100."""
    state = RequestState(ROW, 96, 96, 100, 100)
    return SelectOp(
        state=state, row=ROW, prefix_end=96, condensed_end=100, old_recent_start=100, recent_start=100 + SPAN,
        first_query=200, seq_len=210, condensed_list_bound=bound, recalibrate=False, ring_slot=0,
    )  # fmt: skip


@pytest.mark.parametrize(("bits", "dtype"), [(4, torch.float16), (8, torch.float32)], ids=str)
@pytest.mark.parametrize(("head_dim", "page_size", "heads"), [(64, 32, 3), (128, 64, 2), (256, 32, 1)])
@pytest.mark.parametrize("sizes", [[0, 1, 33], [112, 113, 300]], ids=str)
def test_candidates_are_restored(make_case, sizes, head_dim: int, page_size: int, heads: int, bits: int, dtype) -> None:
    lengths = torch.tensor(sizes)[torch.arange(3 * heads) % 3].view(1, 3, heads).repeat(2, 1, 1)
    lengths[:, 0] = 0
    case = make_case(
        lengths, torch.zeros_like(lengths), survivor_bits=bits, head_dim=head_dim, page_size=page_size, dtype=dtype
    )
    memory, op = memory_of(case), select_op(max(sizes))
    slots = case.req_to_token[ROW, 100 : 100 + SPAN].long()
    for storage in (case.k, case.v):
        storage[:, slots] = torch.randn(2, SPAN, heads, head_dim, device=storage.device).to(dtype)
    layers = slice(1, 2)
    found = list_candidates(memory, op, layers)
    got = [x.view(heads, -1, head_dim) for x in restore_candidates(memory, op, layers, found)]
    index = torch.arange(max(sizes), device=case.k.device).expand(1, heads, -1)
    want = reference_packed.read_lists(case.k, case.v, case.layout, case.tables, layers, ROW, index, torch.float64)
    for restored, packed, storage in zip(got, want, (case.k, case.v), strict=True):
        for head in range(heads):
            count = int(lengths[1, ROW, head])
            padding = max(sizes) - count
            own = restored[head, padding : max(sizes)].double()
            assert (own - packed[0, head, :count]).norm() <= TOLERANCE[dtype] * max(1.0, float(own.norm()))
            assert torch.equal(restored[head, max(sizes) :], storage[1, slots, head])
            assert not restored[head, :padding].any()


@pytest.mark.parametrize("tokens", [0, 1, 2, 31, 33, 100])
def test_statistics_are_those_of_the_keys(make_case, tokens: int) -> None:
    lengths = torch.zeros(2, 3, 2, dtype=torch.int64)
    case = make_case(lengths, lengths, survivor_bits=4)
    case.tables.recent_start[ROW] = tokens
    slots = torch.randperm(case.layout.num_slots, generator=torch.Generator().manual_seed(1))[:tokens].int()
    case.req_to_token[ROW, :tokens] = slots.to(case.req_to_token.device)
    drift = torch.linspace(-1, 1, max(1, tokens))[None, :tokens, None, None] * torch.rand(2, 1, 2, case.layout.head_dim)
    keys = torch.randn(2, tokens, 2, case.layout.head_dim) * torch.rand(case.layout.head_dim) ** 4 + 3 + 3 * drift
    case.k[:, slots.long()] = keys.to(case.k)
    want = case.copy()
    reference_packed.take_statistics(want.k, want.tables, want.req_to_token, ROW)
    take_statistics(memory_of(case), ROW)
    for name in ("key_offset", "key_scale"):
        torch.testing.assert_close(getattr(case.tables, name), getattr(want.tables, name), rtol=1e-4, atol=1e-5)
