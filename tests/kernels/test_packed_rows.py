"""Rows in fewer bits: rounding, bytes, and attention over them."""

from __future__ import annotations

import pytest
import torch

from hardkv_sglang.kernels import EMPTY_LSE2, reference
from hardkv_sglang.kernels.cpu_attend import attend
from hardkv_sglang.kernels.cpu_packed import PackedLists, attend_packed, join_packed
from hardkv_sglang.kernels.cpu_rows import RequestLists, join_lists
from hardkv_sglang.kernels.packed_rows import (
    PackedRows,
    key_statistics,
    prepare_keys,
    prepare_queries,
    restore_keys,
    rotation,
)
from hardkv_sglang.kernels.reference_packed import read_lists

BITS = pytest.mark.parametrize("bits", [8, 4])


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@BITS
@pytest.mark.parametrize("head_dim", [2, 16, 64, 80, 128, 256])
def test_rounding_is_half_a_step_at_most(bits: int, head_dim: int) -> None:
    rows = normal(50, head_dim) * normal(50, 1, seed=1).exp() + normal(50, 1, seed=2)
    packed = PackedRows.quantise(rows, bits)
    assert packed.codes.shape == (50, head_dim * bits // 8)
    error = (packed.dequantise(bits, torch.float64) - rows).abs().amax(1)
    # scale and zero are rounded, too
    step = (rows.amax(1) - rows.amin(1)) / (2**bits - 1)
    assert (error <= 0.5 * step + 2**-10 * rows.abs().amax(1)).all()
    # what is on the grid stays, and so do its bytes
    again = PackedRows.quantise(packed.dequantise(bits, torch.float64), bits)
    torch.testing.assert_close(
        again.dequantise(bits, torch.float64), packed.dequantise(bits, torch.float64), rtol=2e-3, atol=2e-3
    )


@BITS
def test_every_code_comes_back(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (30, 16), generator=torch.Generator().manual_seed(bits))
    codes[:, 3], codes[:, 9] = 0, 2**bits - 1  # the whole range, so that scale and zero are those given
    rows = codes.float() * 0.5 - 3
    packed = PackedRows.quantise(rows, bits)
    assert torch.equal(packed.dequantise(bits, torch.float32), rows)
    if bits == 4:
        assert torch.equal(packed.codes & 15, codes[:, :8].byte())
        assert torch.equal(packed.codes >> 4, codes[:, 8:].byte())


@BITS
def test_a_row_depends_on_itself_alone(bits: int) -> None:
    rows = normal(40, 64).float()
    whole = PackedRows.quantise(rows, bits)
    for i in (0, 7, 39):
        alone = PackedRows.quantise(rows[i : i + 1], bits)
        assert torch.equal(alone.codes[0], whole.codes[i])
        assert torch.equal(alone.scales[0], whole.scales[i])


@BITS
def test_odd_rows_stay_finite(bits: int) -> None:
    rows = torch.zeros(5, 32)
    rows[1] = 7.25
    rows[2, 0], rows[2, 1] = 1e9, -1e9
    rows[3] = torch.linspace(0, 1e-9, 32)
    packed = PackedRows.quantise(rows, bits)
    back = packed.dequantise(bits, torch.float32)
    assert back.isfinite().all()
    assert torch.equal(back[:2], rows[:2])
    assert PackedRows.quantise(rows[:0], bits).codes.shape == (0, 32 * bits // 8)


@pytest.mark.parametrize("size", [1, 2, 48, 64, 80, 128])
def test_the_rotation_is_orthonormal(size: int) -> None:
    turn = rotation(size, torch.float64)
    torch.testing.assert_close(turn @ turn.T, torch.eye(size, dtype=torch.float64))
    block = size & -size
    assert torch.equal(turn != 0, torch.block_diag(*[torch.ones(block, block)] * (size // block)) != 0)


def test_prepared_keys_and_queries_give_the_logits() -> None:
    keys, queries = normal(3, 20, 64) * 4 + 9, normal(3, 7, 64, seed=1)
    offset, scale = key_statistics(keys)
    prepared = prepare_keys(keys, offset[:, None], scale[:, None])
    torch.testing.assert_close(restore_keys(prepared, offset[:, None], scale[:, None]), keys)
    q, constant = prepare_queries(queries, offset[:, None], scale[:, None])
    torch.testing.assert_close(q @ prepared.transpose(1, 2) + constant[..., None], queries @ keys.transpose(1, 2))


def test_statistics_of_few_keys() -> None:
    offset, scale = key_statistics(torch.zeros(2, 0, 8))
    assert torch.equal(offset, torch.zeros(2, 8))
    assert torch.equal(scale, torch.ones(2, 8))
    key = normal(2, 1, 8)
    offset, scale = key_statistics(key)
    torch.testing.assert_close(offset, key[:, 0].float())
    assert torch.equal(scale, torch.ones(2, 8))


def test_one_channel_does_not_take_the_steps_of_the_others() -> None:
    """What Qwen2.5's keys are like: some channels are large and always about the same, some spread widely."""
    keys = normal(400, 64)
    keys[:, 5] += 200
    keys[:, 40] *= 60
    offset, scale = key_statistics(keys)
    packed = PackedRows.quantise(prepare_keys(keys, offset, scale), 4)
    error = restore_keys(packed.dequantise(4, torch.float64), offset, scale) - keys
    plain = PackedRows.quantise(keys, 4).dequantise(4, torch.float64) - keys
    q = normal(64, 100, seed=1)
    assert (error @ q).square().mean() < 0.02 * (plain @ q).square().mean()


def lists_of(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Condensed and sparse counts [2, 4, 2] around the size of a head page; row 0 pads."""
    num_condensed, num_sparse = torch.zeros(2, 4, 2, dtype=torch.int64), torch.zeros(2, 4, 2, dtype=torch.int64)
    num_condensed[0, 1:] = torch.tensor([[0, 1], [tokens - 1, tokens], [tokens + 1, 3 * tokens + 5]])
    num_condensed[1, 1:] = torch.tensor([[0, 0], [2 * tokens, 0], [1, 2]])
    num_sparse[0, 2], num_sparse[1, 3] = torch.tensor([7, 0]), torch.tensor([0, 33])
    return num_condensed, num_sparse


@BITS
@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_over_packed_lists(make_case, bits: int, group: int, dtype: torch.dtype) -> None:
    counts = lists_of({8: 60, 4: 112}[bits] if dtype == torch.bfloat16 else 100)
    case = make_case(*counts, group=group, dtype=dtype, survivor_bits=bits, device="cpu")
    rows, layout, scale = [3, 1, 2], case.layout, case.cfg.softmax_scale
    packed = join_packed([PackedLists.read(layout, case.tables, row) for row in rows], group, torch.float32)
    lists = [RequestLists.read(layout, case.tables, case.req_to_token, row) for row in rows]
    sparse = join_lists(lists, layout, group, torch.float32)
    for layer in range(2):
        q = normal(3, 2 * group, 64, seed=layer).to(dtype)
        state = attend_packed(q, case.k, case.v, layout, case.tables, layer, torch.tensor(rows), packed[layer], scale)
        flat = [x.view(-1, 64) for x in (case.k, case.v)]
        o, lse2 = reference.merge_states(state, attend(q.flatten(0, 1), *flat, sparse[layer], scale))
        for i, row in enumerate(rows):
            expected_o, expected_lse2 = case.oracle(q[i], layer, row)
            heads = slice(2 * group * i, 2 * group * (i + 1))
            torch.testing.assert_close(o[heads].double(), expected_o, rtol=0, atol=2e-4)
            live = expected_lse2 > EMPTY_LSE2 / 2
            assert ((lse2[heads] > EMPTY_LSE2 / 2) == live).all()
            torch.testing.assert_close(lse2[heads].double()[live], expected_lse2[live], rtol=0, atol=2e-4)


@BITS
def test_the_definition_reads_what_was_stored(make_case, bits: int) -> None:
    """`reference.ragged_decode` against attention over the rows, one by one."""
    case = make_case(*lists_of(100), survivor_bits=bits, device="cpu")
    q = normal(8, 64)
    for layer, row in ((0, 1), (0, 2), (0, 3), (1, 3)):
        index = torch.arange(int(case.tables.num_condensed[layer, row].max())).expand(1, 2, -1)
        keys, values = read_lists(
            case.k, case.v, case.layout, case.tables, slice(layer, layer + 1), row, index, torch.float64
        )
        rows, counts = reference.ragged_rows(case.layout, case.tables, case.req_to_token, layer, row)
        o, _ = case.oracle(q, layer, row)
        for head in range(2):
            n = int(case.tables.num_condensed[layer, row, head])
            sparse = rows[head, : counts[head]]
            k = torch.cat((keys[0, head, :n], case.k.view(-1, 64)[sparse].double()))
            v = torch.cat((values[0, head, :n], case.v.view(-1, 64)[sparse].double()))
            heads = slice(4 * head, 4 * head + 4)
            weights = (q[heads] @ k.T * case.cfg.softmax_scale).softmax(-1)
            torch.testing.assert_close(o[heads], weights @ v if len(k) else torch.zeros(4, 64).double())
            # past the end there is nothing
            assert not keys[0, head, n:].any()
