"""The decode kernel over packed survivors against the float64 reference, on pools whose unused bytes are NaN."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hardkv_sglang.kernels import EMPTY_LSE2
from hardkv_sglang.kernels.packed_decode import packed_decode
from hardkv_sglang.kernels.ragged_plan import plan_ragged_decode
from hardkv_sglang.kernels.ragged_workspace import RaggedWorkspace, SplitTokens, Tuning

TOLERANCE = {torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 6e-3}
KINDS = [(4, torch.float16), (8, torch.float32)]
if torch.cuda.is_available():  # numpy has no bfloat16 dot
    KINDS += [(4, torch.bfloat16), (8, torch.bfloat16), (4, torch.float32), (8, torch.float16)]
SIZES = [0, 1, 31, 33, 111, 112, 113, 120, 121, 257, 300, 700]
SPARSE = [0, 0, 1, 33, 64, 200]


def draw_lengths(L: int, R: int, H: int, sizes: list[int], seed: int) -> torch.Tensor:
    """[L, R, H] lengths out of `sizes`; row 0 stays empty."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.tensor(sizes)[torch.randint(len(sizes), (L, R, H), generator=g)]
    lengths[:, 0] = 0
    return lengths


def run(case, rows, q, layer, split=None, tuning=None, max_list_tokens: int = 4096):
    """Plan and decode into an empty state."""
    device, heads = case.k.device, case.cfg.num_q_heads
    workspace = RaggedWorkspace.allocate(
        case.layout, heads, 8, max_list_tokens, device, split or SplitTokens.fixed()
    )  # fmt: skip
    o = torch.zeros(q.shape, dtype=torch.float32, device=device)
    lse2 = torch.full(q.shape[:2], EMPTY_LSE2, device=device)
    args = (workspace, case.layout, case.tables)
    plan_ragged_decode(*args, rows)
    packed_decode(*args, case.req_to_token, case.k, case.v, layer, q, case.cfg.softmax_scale, (o, lse2), tuning)
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
        atol = 1e-4 if q.dtype == torch.float32 else 2e-2
        torch.testing.assert_close(lse2[b].double()[real], want_lse2[real], rtol=1e-5, atol=atol)
        assert (lse2[b][~real] == EMPTY_LSE2).all()
        assert not o[b][~real].any()


@pytest.mark.parametrize(("bits", "dtype"), KINDS, ids=str)
@pytest.mark.parametrize(
    ("group", "heads", "head_dim", "page_size"),
    [(4, 2, 64, 32), (1, 3, 64, 64), (8, 1, 128, 32), (16, 1, 256, 32), (7, 1, 64, 32)],
)
def test_packed_decode(make_case, group: int, heads: int, head_dim: int, page_size: int, bits: int, dtype) -> None:
    case = make_case(
        draw_lengths(2, 4, heads, SIZES, seed=1), draw_lengths(2, 4, heads, SPARSE, seed=2),
        group=group, head_dim=head_dim, page_size=page_size, dtype=dtype, survivor_bits=bits,
    )  # fmt: skip
    rows = torch.tensor([2, 0, 3, 1, 0], dtype=torch.int32, device=case.k.device)
    q = queries(case, rows)
    assert_matches(case, rows, q, 1, *run(case, rows, q, layer=1))


def test_a_result_is_the_same_alone_and_in_a_batch(make_case) -> None:
    tuning = Tuning(block_tokens=32, num_warps=2, num_stages=3, programs_per_multiprocessor=3)
    case = make_case(draw_lengths(1, 3, 2, [0, 113, 400], 5), draw_lengths(1, 3, 2, [0, 20], 6), survivor_bits=4)
    rows = torch.tensor([2, 1], device=case.k.device)
    q = queries(case, rows)
    o, lse2 = run(case, rows, q, 0, tuning=tuning)
    for b in range(rows.numel()):
        alone = run(case, rows[b : b + 1], q[b : b + 1], 0, tuning=tuning)
        assert torch.equal(o[b], alone[0][0]) and torch.equal(lse2[b], alone[1][0])
    again = run(case, rows, q, 0, tuning=replace(tuning, programs_per_multiprocessor=1))
    assert torch.equal(o, again[0]) and torch.equal(lse2, again[1])
