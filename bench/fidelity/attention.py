"""Attention of a block of queries over a fixed context and, causally, over the block itself."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from bench.fidelity.model import ModelShape
from hardkv_sglang.kernels import EMPTY_LSE2
from hardkv_sglang.kernels.reference import State, merge_states

LOG2_E = math.log2(math.e)
OUTSIDE = -1e30  # logit of what is not there; finite, so that empty lists give numbers


@dataclass(frozen=True)
class Context:
    """What every query of a block attends beside the block: per KV head, the first `counts[h]` of N tokens."""

    keys: torch.Tensor  # [H, N, D]
    values: torch.Tensor  # [H, N, D]
    counts: list[int]  # [H]
    mask: torch.Tensor | None = None  # [H, 1, N] additive, on a GPU where a list is shorter than N

    @staticmethod
    def mask_of(counts: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """Masks [..., 1, N] of lists with these counts ([...] int64)."""
        outside = torch.arange(num_tokens, device=counts.device) >= counts[..., None]
        return torch.zeros(outside.shape, device=counts.device).masked_fill_(outside, OUTSIDE)[..., None, :]


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, mask: torch.Tensor | None) -> State:
    """Attention with its base-2 LSE.

    q: [H, T, D]; k, v: [H, N, D], N > 0; mask: additive, [T, N], on a GPU also [H, 1, N].
    """
    if not q.is_cuda:
        o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q[None], k[None], v[None], attn_mask=mask, scale=scale
        )
        return o[0], lse[0] * LOG2_E
    logits = torch.baddbmm(mask if mask is not None else q.new_zeros(1, 1, 1), q, k.transpose(1, 2), alpha=scale)
    lse = logits.logsumexp(-1, keepdim=True)
    return torch.exp(logits - lse) @ v, lse[..., 0] * LOG2_E


def context_attention(q: torch.Tensor, context: Context, scale: float) -> State:
    """Attention of q [H, T, D] over each KV head's context; an empty one weighs nothing in a merge."""
    keys, values, counts = context.keys, context.values, context.counts
    T, N = q.shape[1], keys.shape[1]
    if len(set(counts)) == 1 and counts[0] == N:
        return attention(q, keys, values, scale, None)
    if q.is_cuda:
        # an empty list has an LSE near OUTSIDE, which weighs nothing beside the block's
        return attention(q, keys, values, scale, context.mask)
    parts = [
        attention(q[h : h + 1], keys[h : h + 1, :n], values[h : h + 1, :n], scale, None)
        if n
        else (torch.zeros_like(q[h : h + 1]), q.new_full((1, T), EMPTY_LSE2))
        for h, n in enumerate(counts)
    ]
    return torch.cat([o for o, _ in parts]), torch.cat([lse2 for _, lse2 in parts])


def block_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, context: Context, scale: float) -> State:
    """Each query attends its KV head's context and the block up to itself.

    q: [HQ, T, D]; k, v: [H, T, D]. Returns o [HQ, T, D] and lse2 [HQ, T].
    """
    H, T, D = k.shape
    grouped = q.reshape(H, -1, D)  # the query heads of a KV head, one after the other
    causal = torch.full((T, T), -math.inf, device=q.device).triu(1).repeat(grouped.shape[1] // T, 1)
    state = attention(grouped, k, v, scale, causal)
    if any(context.counts):
        state = merge_states(state, context_attention(grouped, context, scale))
    return state[0].reshape(-1, T, D), state[1].reshape(-1, T)


class DenseCache:
    """Attention over everything: the reference, and the prefill of every run."""

    def __init__(self, shape: ModelShape, max_len: int, device: torch.device | str = "cpu") -> None:
        self.shape = shape
        size = (shape.num_layers, shape.num_kv_heads, max_len, shape.head_dim)
        self.keys, self.values = torch.empty(size, device=device), torch.empty(size, device=device)
        self.seq_len = 0

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """See `BlockAttention.attend`; the caller advances `seq_len` after the last layer."""
        begin, end = self.seq_len, self.seq_len + k.shape[1]
        k, v = self.stored(k), self.stored(v)
        counts = [begin] * self.shape.num_kv_heads
        context = Context(self.keys[layer, :, :begin], self.values[layer, :, :begin], counts)
        o, _ = block_attention(q, k, v, context, self.shape.softmax_scale)
        self.keys[layer, :, begin:end] = k
        self.values[layer, :, begin:end] = v
        return o

    def stored(self, rows: torch.Tensor) -> torch.Tensor:
        """What the cache keeps of keys or values [H, T, D]: all of it."""
        return rows

    def head(self, num_tokens: int) -> DenseCache:
        """A copy of the first `num_tokens` tokens."""
        part = DenseCache(self.shape, num_tokens, self.keys.device)
        part.keys.copy_(self.keys[:, :, :num_tokens])
        part.values.copy_(self.values[:, :, :num_tokens])
        part.seq_len = num_tokens
        return part
