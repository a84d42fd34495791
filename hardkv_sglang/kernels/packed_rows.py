"""Rows in fewer bits: how they are quantised, packed and read again, in torch. The definition.

A row is quantised over even steps of its own: `code * scale + zero`. Keys are prepared first, so that no channel
takes the steps of all others: less the list's offset, divided by its scale, each per channel, then rotated.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

MOST_SCALE = 16.0  # of a channel over the list's mean, and least of one under it
LARGEST = 65504.0  # float16


@dataclass(frozen=True)
class PackedRows:
    """Rows [N, D] as bytes. With 4 bits, byte i holds elements i (low half) and i + D / 2."""

    codes: torch.Tensor  # [N, D * bits / 8] uint8
    scales: torch.Tensor  # [N, 2] float16: scale and zero

    @classmethod
    def quantise(cls, rows: torch.Tensor, bits: int) -> PackedRows:
        """The nearest codes for rows [N, D]. Deterministic; a row's bytes depend on that row alone."""
        x = rows.to(torch.promote_types(rows.dtype, torch.float32))
        low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
        zero = low.clamp(-LARGEST, LARGEST).half()
        scale = ((high - low) / (2**bits - 1)).clamp(max=LARGEST).half()
        steps = torch.where(scale > 0, (x - zero) / scale, 0.0)
        codes = (steps + 0.5).floor().clamp(0, 2**bits - 1).to(torch.uint8)
        if bits == 4:
            low_half, high_half = codes.chunk(2, 1)
            codes = low_half | high_half << 4
        return cls(codes, torch.cat((scale, zero), 1))

    def dequantise(self, bits: int, kind: torch.dtype) -> torch.Tensor:
        """Rows [N, D] of type `kind`."""
        codes = torch.cat((self.codes & 15, self.codes >> 4), -1) if bits == 4 else self.codes
        scale, zero = self.scales.to(kind).split(1, -1)
        return codes.to(kind) * scale + zero


def rotation(size: int, kind: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
    """Orthonormal matrix [size, size]: Hadamard's, in blocks of the largest power of 2 that divides `size`."""
    block = size & -size
    matrix = torch.ones(1, 1, dtype=kind, device=device)
    while matrix.shape[0] < block:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return torch.block_diag(*[matrix * block**-0.5] * (size // block))


def key_statistics(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Offset and scale of lists [..., D], float32, from keys at hand [..., N, D], in the order of their positions.

    The offset is the mean, the scale the root of the deviation over that of all channels: of the errors that quantising
    leaves, q.k sees least when a channel's scale is the root of its spread over that of the queries, which are about
    alike in all channels. Where RoPE turns a pair of channels, i and i + D / 2, the mean will not stay: the more it
    moved from the first half of the keys to the second, the less of it counts as offset, and the more as spread.
    Without keys: 0 and 1.
    """
    x = keys.float()
    if x.shape[-2] < 2:
        offset = x.sum(-2)
        return offset, torch.ones_like(offset)
    mean, (early, late) = x.mean(-2), (half.mean(-2) for half in x.tensor_split(2, -2))
    moved, size = _of_pair((early - late).square()), _of_pair(mean.square())
    turning = moved / (moved + size).clamp(min=torch.finfo(torch.float32).tiny)
    spread = (x.var(-2, correction=0) + turning * size / 2).sqrt()
    whole = spread.square().mean(-1, keepdim=True).sqrt()
    scale = torch.where(whole > 0, spread / whole, 1.0).sqrt().clamp(1 / MOST_SCALE, MOST_SCALE)
    return mean * (1 - turning), scale


def _of_pair(x: torch.Tensor) -> torch.Tensor:
    """Sum over the two channels that RoPE turns together; x: [..., D]."""
    return x + x.roll(x.shape[-1] // 2, -1)


def prepare_keys(keys: torch.Tensor, offset: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """What is quantised of keys [..., D]; offset, scale: broadcast to them, float32."""
    kind = torch.promote_types(keys.dtype, torch.float32)
    return ((keys.to(kind) - offset) / scale) @ rotation(keys.shape[-1], kind, keys.device)


def restore_keys(prepared: torch.Tensor, offset: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Keys again; the inverse of `prepare_keys` but for rounding."""
    turn = rotation(prepared.shape[-1], prepared.dtype, prepared.device)
    return (prepared @ turn.T) * scale + offset


def prepare_queries(
    queries: torch.Tensor, offset: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries for prepared keys: `q.k = prepared_q.prepared_k + constant`; returns these two.

    queries: [..., D]; offset, scale: of each one's list, broadcast to them. The constant, [...], is the same for every
    key of the list.
    """
    kind = torch.promote_types(queries.dtype, torch.float32)
    q = queries.to(kind)
    return (q * scale) @ rotation(q.shape[-1], kind, q.device), (q * offset).sum(-1)
