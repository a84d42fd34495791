"""Attention of a block of queries over a fixed context and, causally, over the block itself."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from bench.fidelity.model import ModelShape
from hardkv_sglang.kernels.reference import State, merge_states

LOG2_E = math.log2(math.e)


def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, mask: torch.Tensor | None = None) -> State:
    """Attention with its base-2 LSE. q: [H, T, D]; k, v: [H, N, D]; mask: [T, N] additive."""
    o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q[None], k[None], v[None], attn_mask=mask, scale=scale
    )
    return o[0], lse[0] * LOG2_E


def block_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    context: Sequence[tuple[torch.Tensor, torch.Tensor]],
    scale: float,
) -> State:
    """Each query attends its KV head's context and the block up to itself.

    q: [HQ, T, D]; k, v: [H, T, D]; context: per KV head, keys and values [N, D] that every query attends.
    Returns o [HQ, T, D] and lse2 [HQ, T].
    """
    H, T, D = k.shape
    grouped = q.reshape(H, -1, D)  # the query heads of a KV head, one after the other
    causal = torch.full((T, T), -math.inf).triu(1).repeat(grouped.shape[1] // T, 1)
    state = flash(grouped, k, v, scale, causal)
    if any(len(keys) for keys, _ in context):
        outside = [
            flash(grouped[h : h + 1], keys[None], values[None], scale) for h, (keys, values) in enumerate(context)
        ]
        state = merge_states(state, (torch.cat([o for o, _ in outside]), torch.cat([lse2 for _, lse2 in outside])))
    return state[0].reshape(-1, T, D), state[1].reshape(-1, T)


class DenseCache:
    """Attention over everything: the reference, and the prefill of every run."""

    def __init__(self, shape: ModelShape, max_len: int) -> None:
        self.shape = shape
        size = (shape.num_layers, shape.num_kv_heads, max_len, shape.head_dim)
        self.keys, self.values = torch.empty(size), torch.empty(size)
        self.seq_len = 0

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """See `BlockAttention.attend`; the caller advances `seq_len` after the last layer."""
        end = self.seq_len + k.shape[1]
        context = list(zip(self.keys[layer, :, : self.seq_len], self.values[layer, :, : self.seq_len], strict=True))
        o, _ = block_attention(q, k, v, context, self.shape.softmax_scale)
        self.keys[layer, :, self.seq_len : end] = k
        self.values[layer, :, self.seq_len : end] = v
        return o

    def head(self, num_tokens: int) -> DenseCache:
        """A copy of the first `num_tokens` tokens."""
        part = DenseCache(self.shape, num_tokens)
        part.keys.copy_(self.keys[:, :, :num_tokens])
        part.values.copy_(self.values[:, :, :num_tokens])
        part.seq_len = num_tokens
        return part
