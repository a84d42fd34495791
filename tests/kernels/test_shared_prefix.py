"""Attention over shared prefixes against the float64 reference, on pools whose unused rows hold NaN."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch

from hardkv_sglang.config import HardKVConfig
from hardkv_sglang.kernels import EMPTY_LSE2, reference
from hardkv_sglang.kernels.finish import finish_layer
from hardkv_sglang.kernels.shared_plan import MIN_SPLIT, SPLIT_ALIGN, SharedPrefixWorkspace, SharedTuning, cut_groups
from hardkv_sglang.kernels.shared_prefix import shared_prefix_decode
from hardkv_sglang.kernels.shared_slots import copy_shared_slots
from hardkv_sglang.lifecycle.prefix_groups import PrefixGroup
from hardkv_sglang.memory_pool.layout import PoolLayout
from hardkv_sglang.memory_pool.resolved_config import ResolvedConfig
from hardkv_sglang.memory_pool.tables import DeviceTables

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 8e-3}
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()  # numpy has no bfloat16 dot
LAYER, OWN = 1, 5  # tokens behind the prefix


@dataclass
class Batch:
    """Requests whose rows of req_to_token start with the slots of their group."""

    layout: PoolLayout
    groups: list[PrefixGroup]
    rows: torch.Tensor  # [B]
    req_to_token: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    q: torch.Tensor

    def oracle(self, entry: int, start: int, end: int) -> reference.State:
        slots = self.req_to_token[self.rows[entry].long(), start:end].long()
        args = (self.k[LAYER].double(), self.v[LAYER].double(), slots, self.layout.head_dim**-0.5)
        return reference.dense_decode(self.q[entry].double(), *args)


def build_batch(
    groups: list[PrefixGroup],
    size: int,
    device: str,
    dtype=torch.float32,
    heads: int = 2,
    group: int = 4,
    dim: int = 64,
) -> Batch:
    g = torch.Generator().manual_seed(0)
    tokens = sum(x.num_tokens for x in groups) + size * OWN
    layout = PoolLayout(2, heads, dim, 32, -(-(tokens + 64) // 32) * 32)
    slots = torch.randperm(layout.num_slots - 1, generator=g).int() + 1
    rows = torch.randperm(size + 3, generator=g)[:size]
    longest = max([x.num_tokens for x in groups], default=0) + OWN
    req_to_token = torch.zeros(size + 3, longest, dtype=torch.int32)
    lens = [0] * size
    for x in groups:
        own, slots = slots[: x.num_tokens], slots[x.num_tokens :]
        for entry in x.members:
            req_to_token[rows[entry], : x.num_tokens] = own
            lens[entry] = x.num_tokens
    for entry in range(size):
        own, slots = slots[:OWN], slots[OWN:]
        req_to_token[rows[entry], lens[entry] : lens[entry] + OWN] = own
    used = torch.cat([req_to_token[rows[i], : lens[i] + OWN] for i in range(size)]).long()
    k, v = (torch.full((2, layout.num_slots, heads, dim), torch.nan, dtype=dtype) for _ in range(2))
    for storage in (k, v):
        storage[:, used] = torch.randn(2, used.numel(), heads, dim, generator=g).to(dtype)
    q = torch.randn(size, heads * group, dim, generator=g).to(dtype)
    tensors = [x.to(device) for x in (rows, req_to_token, k, v, q)]
    return Batch(layout, groups, *tensors)


def workspace_for(batch: Batch, max_batch: int) -> SharedPrefixWorkspace:
    group_size = batch.q.shape[1] // batch.layout.num_kv_heads
    tuning = SharedTuning.default(batch.layout.head_dim * batch.k.element_size(), group_size)
    return SharedPrefixWorkspace.allocate(batch.layout, batch.q.shape[1], max_batch, batch.k.device, tuning)


def tables_for(batch: Batch) -> DeviceTables:
    """Tables in which only the first request of the batch has a place in the observation ring."""
    options, num_rows = HardKVConfig(max_tokens=32), batch.req_to_token.shape[0]
    cfg = ResolvedConfig(options, batch.layout, batch.q.shape[1], 1.0, num_rows, 1024)
    tables = DeviceTables.allocate(cfg, batch.q.dtype, batch.q.device)
    tables.ring_slot[batch.rows[0]] = 0
    return tables


def run(batch: Batch, state: reference.State, workspace: SharedPrefixWorkspace | None = None) -> torch.Tensor:
    """Plan and merge into `state`; returns the planned shared lengths."""
    size = batch.rows.numel()
    workspace = workspace or workspace_for(batch, size + 2)
    lens = workspace.plan(batch.groups)
    copy_shared_slots(workspace, batch.rows, batch.req_to_token)
    scale = batch.layout.head_dim**-0.5
    shared_prefix_decode(workspace, batch.layout, batch.k, batch.v, LAYER, batch.q, scale)
    tables = tables_for(batch)
    finish_layer(tables, workspace, LAYER, batch.rows, torch.ones_like(batch.rows), batch.q, state)
    assert torch.equal(tables.lse2_ring[LAYER, 0, 0], state[1][0])
    assert torch.equal(tables.query_ring[LAYER, 0, 0], batch.q[0])
    assert workspace.shared_len.tolist() == lens.tolist()
    return lens


def own_state(batch: Batch) -> reference.State:
    """State over the tokens behind the shared prefix, as FlashInfer hands it over."""
    size, lens = batch.rows.numel(), shared_lens(batch)
    states = [batch.oracle(entry, lens[entry], lens[entry] + OWN) for entry in range(size)]
    return torch.stack([o for o, _ in states]).to(batch.q.dtype), torch.stack([lse2 for _, lse2 in states]).float()


def shared_lens(batch: Batch) -> list[int]:
    lens = [0] * batch.rows.numel()
    for group in batch.groups:
        for entry in group.members:
            lens[entry] = group.num_tokens
    return lens


GROUPS = [
    [],
    [PrefixGroup(32, (0, 3))],
    [PrefixGroup(MIN_SPLIT + 16, (1, 2, 4))],
    [PrefixGroup(1024, (4, 0)), PrefixGroup(96, (1, 5))],
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups", GROUPS, ids=["none", "short", "split", "two"])
def test_prefix_and_own_tokens_make_the_whole(device: str, groups: list[PrefixGroup], dtype: torch.dtype) -> None:
    batch = build_batch(groups, 6, device, dtype)
    o, lse2 = own_state(batch)
    before = o.clone(), lse2.clone()
    lens = run(batch, (o, lse2))
    for entry, shared in enumerate(shared_lens(batch)):
        assert lens[entry] == shared
        want_o, want_lse2 = batch.oracle(entry, 0, shared + OWN)
        assert (o[entry].double() - want_o).norm() <= TOLERANCE[dtype] * want_o.norm(), f"entry {entry}"
        torch.testing.assert_close(lse2[entry].double(), want_lse2, rtol=1e-5, atol=1e-4)
        if not shared:
            assert torch.equal(o[entry], before[0][entry])
            assert torch.equal(lse2[entry], before[1][entry])


@pytest.mark.parametrize(
    ("heads", "group", "dim", "members"),
    [(3, 1, 64, 70), (1, 3, 64, 23), (1, 8, 128, 9), (2, 2, 256, 2), (1, 7, 64, 19), (1, 16, 64, 3), (1, 71, 64, 2)],
)
def test_shapes(device: str, heads: int, group: int, dim: int, members: int) -> None:
    # more members than a tile holds; into empty states, which gives the state of the prefix alone
    batch = build_batch(
        [PrefixGroup(320, tuple(range(1, members + 1)))], members + 1, device, torch.float32, heads, group, dim
    )
    o = torch.zeros(batch.q.shape, device=device)
    lse2 = torch.full(batch.q.shape[:2], EMPTY_LSE2, device=device)
    run(batch, (o, lse2))
    assert not o[0].any()
    for entry in range(1, members + 1):
        want_o, want_lse2 = batch.oracle(entry, 0, 320)
        assert (o[entry].double() - want_o).norm() <= TOLERANCE[torch.float32] * want_o.norm(), f"entry {entry}"
        torch.testing.assert_close(lse2[entry].double(), want_lse2, rtol=1e-5, atol=1e-4)


def test_a_new_plan_replaces_the_old(device: str) -> None:
    batch = build_batch([PrefixGroup(64, (0, 1)), PrefixGroup(512, (2, 3))], 4, device)
    workspace = workspace_for(batch, 8)
    run(batch, own_state(batch), workspace)
    batch.groups = []
    o, lse2 = own_state(batch)
    before = o.clone()
    run(batch, (o, lse2), workspace)
    assert torch.equal(o, before)


@pytest.mark.parametrize("target", [1, 3, 33])
@pytest.mark.parametrize("tokens", [[], [32], [255, 256, 257], [16, 5000, 2048, 2048], [32] * 40])
def test_groups_are_cut_once(tokens: list[int], target: int) -> None:
    groups = [PrefixGroup(n, tuple(range(100 * i, 100 * i + 2 + 3 * i % 7))) for i, n in enumerate(tokens)]
    items = cut_groups(groups, 4, target)
    tiles = sum(-(-len(group.members) // 4) for group in groups)
    assert len(items) <= tiles + target
    want = [
        (member, token) for group in groups for member in range(len(group.members)) for token in range(group.num_tokens)
    ]
    first, first_slot, seen = 0, 0, []
    for group in groups:
        own = [item for item in items if first <= item.first_member < first + len(group.members)]
        seen += [
            (item.first_member - first + m, t)
            for item in own for m in range(item.num_members) for t in range(item.start, item.end)
        ]  # fmt: skip
        first += len(group.members)
        assert all(item.num_members <= 4 and item.start % SPLIT_ALIGN == 0 for item in own)
        assert {item.first_slot for item in own} == {first_slot}
        first_slot += group.num_tokens
    assert sorted(seen) == sorted(want)
    # splits of a tile follow each other
    assert all(b.start == (a.end if a.first_member == b.first_member else 0) for a, b in itertools.pairwise(items))
