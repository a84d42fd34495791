"""`reference.attend` by PyTorch's own CPU kernel: the same contract in half the time."""

from __future__ import annotations

import math

import torch

from hardkv_sglang.kernels import EMPTY_LSE2
from hardkv_sglang.kernels.reference import State

LOG2_E = math.log2(math.e)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, counts: torch.Tensor, scale: float) -> State:
    """Attention of one query token over one ragged list per KV head; see `reference.attend`. CPU tensors."""
    (H, N, D), HQ = k.shape, q.shape[0]
    kind = torch.promote_types(q.dtype, torch.float32)
    if N == 0:
        return q.new_zeros((HQ, D), dtype=kind), q.new_full((HQ,), EMPTY_LSE2, dtype=kind)
    grouped = q.to(kind).view(1, H, -1, D)
    outside = torch.arange(N)[None, :] >= counts[:, None]
    mask = torch.zeros((H, N), dtype=kind).masked_fill_(outside, -math.inf)
    # called below `scaled_dot_product_attention`, which does not return the LSE
    o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        grouped,
        k.to(kind)[None],
        v.to(kind)[None],
        attn_mask=mask[None, :, None, :].expand(1, H, HQ // H, N),
        scale=scale,
    )
    lse2 = torch.where(counts[:, None] > 0, lse.reshape(H, -1) * LOG2_E, EMPTY_LSE2)
    return o.reshape(HQ, D), lse2.reshape(HQ).to(kind)
