"""The rival that rates keys by query centres computes what its paper defines."""

from __future__ import annotations

import torch

from bench.fidelity.tri import OFFSETS, QueryStatistics

LAYERS, KV_HEADS, GROUP, FREQUENCIES, TOKENS, SEQ_LEN = 2, 3, 2, 8, 20, 40


def by_definition(
    centre: torch.Tensor, spread: torch.Tensor, omega: torch.Tensor, key: torch.Tensor, position: int
) -> float:
    """One query head, one key before RoPE: a trigonometric series over later distances, and the key's lengths."""
    total = 0.0
    for exponent in range(OFFSETS):
        distance = SEQ_LEN - position + 2**exponent
        phase = distance * omega + centre.angle() - key.angle()
        total += float((centre.abs() * key.abs() * phase.cos()).sum())
    return total / OFFSETS + float((spread * key.abs()).sum())


def test_scores_are_those_of_the_definition() -> None:
    rng = torch.Generator().manual_seed(0)

    def pairs(*size: int) -> torch.Tensor:
        return torch.complex(*(torch.randn(*size, generator=rng, dtype=torch.float64) for _ in range(2)))

    omega = 10000.0 ** -(torch.arange(FREQUENCIES, dtype=torch.float64) / FREQUENCIES)
    centre = pairs(LAYERS, KV_HEADS * GROUP, FREQUENCIES)
    spread = torch.rand(centre.shape, generator=rng, dtype=torch.float64)
    before, positions = pairs(KV_HEADS, TOKENS, FREQUENCIES), torch.arange(TOKENS)
    after = before * torch.polar(torch.ones_like(omega), positions[:, None] * omega)
    valid = torch.ones(KV_HEADS, TOKENS, dtype=torch.bool)
    valid[1, :5] = False
    keys = torch.cat((after.real, after.imag), -1).float()
    keys[~valid] = torch.nan  # padding may hold anything

    got = QueryStatistics(centre, spread, omega).rate(keys, valid, SEQ_LEN, slice(1, 2))
    for head in range(KV_HEADS):
        chosen = positions[valid[head]].tolist()
        heads = range(head * GROUP, (head + 1) * GROUP)
        raw = torch.tensor(
            [
                [by_definition(centre[1, q], spread[1, q], omega, before[head, p], p) for p in chosen]
                for q in heads
            ],
            dtype=torch.float64,
        )  # fmt: skip
        standard = (raw - raw.mean(1, keepdim=True)) / raw.std(1, unbiased=False, keepdim=True)
        best = standard.amax(0)
        torch.testing.assert_close(got[head, valid[head]].double(), best - best.min(), rtol=1e-4, atol=1e-4)
    assert (got[~valid] == 0).all() and (got >= 0).all()


def test_no_candidates() -> None:
    statistics = QueryStatistics(
        torch.zeros(1, 2, 4, dtype=torch.complex128), torch.zeros(1, 2, 4), torch.ones(4, dtype=torch.float64)
    )
    assert statistics.rate(torch.zeros(1, 0, 8), torch.zeros(1, 0, dtype=torch.bool), 10, slice(0, 1)).shape == (1, 0)
