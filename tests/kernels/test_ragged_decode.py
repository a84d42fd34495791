"""The ragged decode kernel against the float64 reference, on pools whose unused rows hold NaN."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton

from hardkv_sglang.kernels import EMPTY_LSE2, reference
from hardkv_sglang.kernels.ragged_decode import ragged_decode
from hardkv_sglang.kernels.ragged_plan import plan_ragged_decode
from hardkv_sglang.kernels.ragged_workspace import RaggedWorkspace, SplitTokens, Tuning

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()  # numpy has no bfloat16 dot


def draw_lengths(L: int, R: int, H: int, sizes: list[int], seed: int) -> torch.Tensor:
    """[L, R, H] lengths out of `sizes`; row 0 stays empty."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.tensor(sizes)[torch.randint(len(sizes), (L, R, H), generator=g)]
    lengths[:, 0] = 0
    return lengths


def workspace_for(case, max_batch: int = 8, max_list_tokens: int = 4096, split=None) -> RaggedWorkspace:
    heads, device = case.cfg.num_q_heads, case.k.device
    split = split or SplitTokens.fixed()
    return RaggedWorkspace.allocate(case.layout, heads, max_batch, max_list_tokens, device, split)


def run(case, workspace, rows, q, layer, o_dtype=None, tuning=None):
    """Plan and decode into an empty state."""
    o = torch.zeros(q.shape, dtype=o_dtype or torch.float32, device=q.device)
    lse2 = torch.full(q.shape[:2], EMPTY_LSE2, device=q.device)
    args = (workspace, case.layout, case.tables)
    plan_ragged_decode(*args, rows)
    pool = (case.req_to_token, case.k, case.v)
    ragged_decode(*args, *pool, layer, q, case.cfg.softmax_scale, (o, lse2), tuning)
    assert not workspace.arrivals.any()
    return o, lse2


def queries(case, rows: torch.Tensor, seed: int = 1) -> torch.Tensor:
    shape = (rows.numel(), case.cfg.num_q_heads, case.layout.head_dim)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(case.k.dtype).to(case.k.device)


def assert_matches(case, rows, q, layer, o, lse2) -> None:
    for b, row in enumerate(rows.tolist()):
        want_o, want_lse2 = case.oracle(q[b], layer, row)
        assert (o[b].double() - want_o).norm() <= TOLERANCE[q.dtype] * want_o.norm(), f"o of row {row}"
        real = want_lse2 > EMPTY_LSE2 / 2
        torch.testing.assert_close(lse2[b].double()[real], want_lse2[real], rtol=1e-5, atol=1e-4)
        assert (lse2[b][~real] == EMPTY_LSE2).all()
        assert not o[b][~real].any()


SIZES = [0, 1, 31, 32, 33, 255, 256, 257, 300, 700]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("group", "heads", "head_dim", "page_size"),
    [(4, 2, 64, 32), (1, 3, 64, 16), (3, 3, 64, 64), (8, 1, 128, 32), (2, 2, 256, 32), (7, 1, 64, 32)],
)
def test_ragged_decode(make_case, group: int, heads: int, head_dim: int, page_size: int, dtype) -> None:
    case = make_case(
        draw_lengths(2, 4, heads, SIZES, seed=1),
        draw_lengths(2, 4, heads, [0, 0, 1, 33, 64, 200], seed=2),
        group=group,
        head_dim=head_dim,
        page_size=page_size,
        dtype=dtype,
    )
    rows = torch.tensor([2, 0, 3, 1, 0], dtype=torch.int32, device=case.k.device)
    q = queries(case, rows)
    assert_matches(case, rows, q, 1, *run(case, workspace_for(case), rows, q, layer=1))


def test_ragged_decode_merges_into_the_state(make_case) -> None:
    """What other tokens gave is merged; that of a request without lists keeps every bit; q may be strided."""
    case = make_case(draw_lengths(1, 4, 2, SIZES, 3), draw_lengths(1, 4, 2, [0, 20], 4), dtype=torch.float16)
    rows = torch.tensor([0, 3, 2, 1], device=case.k.device)
    q = queries(case, rows)
    packed = torch.cat((q, q), 1)[:, : q.shape[1]]
    o_dense = torch.randn_like(q)
    lse2_dense = 8 + torch.randn(q.shape[:2], device=q.device)
    o, lse2 = o_dense.clone(), lse2_dense.clone()
    workspace = workspace_for(case)
    plan_ragged_decode(workspace, case.layout, case.tables, rows)
    pool, scale = (case.req_to_token, case.k, case.v), case.cfg.softmax_scale
    ragged_decode(workspace, case.layout, case.tables, *pool, 0, packed, scale, (o, lse2))
    assert torch.equal(o[0], o_dense[0])
    assert torch.equal(lse2[0], lse2_dense[0])
    for b, row in enumerate(rows.tolist()):
        dense = o_dense[b].double(), lse2_dense[b].double()
        want_o, want_lse2 = reference.merge_states(case.oracle(q[b], 0, row), dense)
        assert (o[b].double() - want_o).norm() <= TOLERANCE[q.dtype] * want_o.norm()
        torch.testing.assert_close(lse2[b].double(), want_lse2, rtol=1e-5, atol=1e-4)


def test_ragged_decode_independent_of_batch(make_case) -> None:
    """A row's result has the same bits alone, in a batch, with another program count, and in a second run."""
    tuning = Tuning(block_tokens=32, num_warps=2, num_stages=3, programs_per_multiprocessor=3)
    fewer_programs = replace(tuning, programs_per_multiprocessor=1)
    case = make_case(draw_lengths(1, 5, 2, SIZES, 5), draw_lengths(1, 5, 2, [0, 20], 6))
    rows = torch.tensor([4, 2, 3, 1], device=case.k.device)
    q = queries(case, rows)
    workspace = workspace_for(case)
    o, lse2 = run(case, workspace, rows, q, 0, tuning=tuning)
    for b in range(rows.numel()):
        o_alone, lse2_alone = run(case, workspace, rows[b : b + 1], q[b : b + 1], 0, tuning=tuning)
        assert torch.equal(o[b], o_alone[0])
        assert torch.equal(lse2[b], lse2_alone[0])
    again = run(case, workspace, rows, q, 0, tuning=fewer_programs)
    assert torch.equal(o, again[0])
    assert torch.equal(lse2, again[1])


@pytest.mark.parametrize(("tokens", "expected"), [(1000, 64), (1100, 128), (3200, 256)])
def test_splits_grow_with_the_load(make_case, tokens: int, expected: int) -> None:
    """Small, middle-sized and large splits by the tokens that a multiprocessor has in a layer, each correct."""
    lists = torch.zeros(1, 3, 2, dtype=torch.int64)
    lists[0, 1:] = length = tokens // 4
    case = make_case(lists, torch.zeros_like(lists))
    workspace = replace(workspace_for(case, split=SplitTokens(64, 128, 256)), num_multiprocessors=1)
    rows = torch.tensor([1, 2], device=case.k.device)
    q = queries(case, rows)
    assert_matches(case, rows, q, 0, *run(case, workspace, rows, q, 0))
    size = 64 * triton.cdiv(triton.cdiv(length, triton.cdiv(length, expected)), 64)
    assert int(workspace.num_items[0]) == 4 * triton.cdiv(length, size)


@pytest.mark.parametrize("sizes", [[0], [0, 1, 31, 32, 33], [0, 700], [1, 64, 300, 2000]], ids=str)
def test_items_cover_every_list_once(make_case, sizes: list[int]) -> None:
    """In order, split after split, with fields that name the list's first item and their number."""
    case = make_case(draw_lengths(2, 7, 2, sizes, 19), draw_lengths(2, 7, 2, [0, 5], 20))
    rows = torch.tensor([3, 0, 1, 6, 5], device=case.k.device)
    workspace = workspace_for(case)
    plan_ragged_decode(workspace, case.layout, case.tables, rows)
    for layer in range(2):
        lens = (case.tables.num_condensed + case.tables.num_sparse)[layer, rows].flatten().tolist()
        items = workspace.items[layer, : int(workspace.num_items[layer])].tolist()
        want = [(i, token) for i, length in enumerate(lens) for token in range(length)]
        assert [(item[0], token) for item in items for token in range(item[2], item[3])] == want
        for i in {item[0] for item in items}:
            own = [n for n, item in enumerate(items) if item[0] == i]
            assert all(items[n][6:] == [own[0], len(own)] for n in own)


@pytest.mark.parametrize("max_list_tokens", [1, 300, 600])
def test_ragged_decode_list_longer_than_planned(make_case, max_list_tokens: int) -> None:
    """Lists past the workspace's expectation get longer splits; the work list never overflows."""
    case = make_case(draw_lengths(1, 3, 2, [700, 900], 7), draw_lengths(1, 3, 2, [0], 8))
    rows = torch.tensor([1, 2], device=case.k.device)
    q = queries(case, rows)
    workspace = workspace_for(case, max_batch=2, max_list_tokens=max_list_tokens)
    assert_matches(case, rows, q, 0, *run(case, workspace, rows, q, 0))
    assert int(workspace.num_items[0]) <= workspace.items.shape[1]


def test_ragged_decode_extreme_logits(make_case) -> None:
    """Logits of +-1e4: finite results that match the oracle."""
    case = make_case(draw_lengths(1, 2, 2, [300], 9), draw_lengths(1, 2, 2, [50], 10))
    rows = torch.tensor([1], device=case.k.device)
    q = 1.0e4 * queries(case, rows)
    o, lse2 = run(case, workspace_for(case), rows, q, 0)
    want_o, want_lse2 = case.oracle(q[0], 0, 1)
    assert (o[0].double() - want_o).norm() <= 1e-2 * want_o.norm()
    torch.testing.assert_close(lse2[0].double(), want_lse2, rtol=1e-5, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_ragged_decode_large(make_case, dtype: torch.dtype, head_dim: int) -> None:
    """Ragged lists up to the cap, 8 heads, 16 requests."""
    sizes = [*range(40, 1200, 37), 2048, 4095, 4096]
    case = make_case(
        draw_lengths(2, 17, 8, sizes, 11),
        draw_lengths(2, 17, 8, [0, 100, 333], 12),
        head_dim=head_dim,
        dtype=dtype,
    )
    rows = torch.arange(16, -1, -1, device=case.k.device)
    q = queries(case, rows)
    workspace = workspace_for(case, max_batch=32)
    first = run(case, workspace, rows, q, 1)
    assert_matches(case, rows, q, 1, *first)
    for _ in range(20):
        again = run(case, workspace, rows, q, 1)
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])


@pytest.mark.gpu
def test_ragged_decode_matches_flashinfer(make_case) -> None:
    """FlashInfer's paged decode over the same lists, every KV head a request of its own, page size 1."""
    import flashinfer  # as a dependency of SGLang it is there, but it wants a GPU to be imported

    case = make_case(
        draw_lengths(2, 9, 8, [1, 33, 500, 1700], 13), draw_lengths(2, 9, 8, [0, 100], 14),
        head_dim=128, dtype=torch.bfloat16,
    )  # fmt: skip
    rows = torch.arange(1, 9, device=case.k.device)
    q = queries(case, rows)
    o, lse2 = run(case, workspace_for(case), rows, q, 1, torch.bfloat16)
    lists = [reference.ragged_rows(case.layout, case.tables, case.req_to_token, 1, r) for r in rows.tolist()]
    indices = torch.cat([x[h, : n[h]] for x, n in lists for h in range(8)]).int()
    counts = torch.cat([n for _, n in lists]).cpu()
    indptr = torch.cat((torch.zeros(1), counts.cumsum(0))).int()
    scratch = torch.zeros(128 << 20, dtype=torch.uint8, device=q.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(scratch, "NHD", use_tensor_cores=True)
    kinds = {"q_data_type": q.dtype, "kv_data_type": q.dtype}
    wrapper.plan(indptr, indices, torch.ones(64, dtype=torch.int32), 4, 1, 128, 1, **kinds)
    flat = tuple(x.view(-1, 1, 1, 128) for x in (case.k, case.v))
    want_o, want_lse2 = wrapper.run(q.view(64, 4, 128), flat, return_lse=True)
    torch.testing.assert_close(o.view(64, 4, 128), want_o, rtol=2e-2, atol=1e-2)
    torch.testing.assert_close(lse2.view(64, 4), want_lse2, rtol=1e-4, atol=2e-3)


@pytest.mark.gpu
def test_ragged_decode_graph_follows_tables(make_case) -> None:
    """One captured step equals eager execution over 100 changes of rows, lengths and queries; nothing syncs."""
    case = make_case(
        draw_lengths(2, 12, 8, [900, 1100], 15),
        draw_lengths(2, 12, 8, [200], 16),
        head_dim=128,
        dtype=torch.bfloat16,
    )
    full = case.tables.num_condensed.clone(), case.tables.num_sparse.clone()
    rows = torch.arange(8, device=case.k.device)
    q = queries(case, rows)
    workspace = workspace_for(case)
    o, lse2 = run(case, workspace, rows, q, 0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    with torch.cuda.graph(graph):
        plan_ragged_decode(workspace, case.layout, case.tables, rows)
        pool = (case.req_to_token, case.k, case.v)
        scale = case.cfg.softmax_scale
        ragged_decode(workspace, case.layout, case.tables, *pool, 0, q, scale, (o, lse2))
    torch.cuda.set_sync_debug_mode("default")
    for _ in range(100):
        rows.copy_(torch.randint(0, 12, (8,), device=rows.device))
        q.normal_()
        for table, most in zip((case.tables.num_condensed, case.tables.num_sparse), full, strict=True):
            table.copy_((most * torch.rand(most.shape, device=most.device)).int())
        o.zero_()
        lse2.fill_(EMPTY_LSE2)
        graph.replay()
        replayed = o.clone(), lse2.clone()
        eager = run(case, workspace, rows, q, 0)
        assert torch.equal(replayed[0], eager[0])
        assert torch.equal(replayed[1], eager[1])


@pytest.mark.gpu
def test_ragged_decode_addresses_past_int32(make_case) -> None:
    """A pool of more than 2^31 elements: the last pages are read where they are."""
    case = make_case(draw_lengths(1, 2, 8, [64], 17), draw_lengths(1, 2, 8, [10], 18), spare_pages=70000, head_dim=128,
                     dtype=torch.bfloat16)  # fmt: skip
    assert case.k.numel() > 2**31
    rows = torch.tensor([1], device=case.k.device)
    far = case.layout.num_slots // case.layout.page_size - 3
    moved = case.copy()
    moved.tables.condensed_pages[1, :2] = torch.tensor([far, far + 1], device=rows.device)
    for source, target in ((case.k, moved.k), (case.v, moved.v)):
        for i, page in enumerate(case.tables.condensed_pages[1, :2].tolist()):
            target[:, (far + i) * 32 :][:, :32] = source[:, page * 32 :][:, :32]
            target[:, page * 32 :][:, :32] = torch.nan
    q = queries(case, rows)
    want = run(case, workspace_for(case), rows, q, 0)
    got = run(moved, workspace_for(moved), rows, q, 0)
    assert torch.equal(got[0], want[0])
