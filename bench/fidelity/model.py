"""The model, one block of tokens at a time, with attention supplied by the caller."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.nn import functional
from transformers import AttentionInterface, AutoModelForCausalLM

IMPLEMENTATION = "hardkv_fidelity"


class BlockAttention(Protocol):
    """Attention of a block of consecutive new tokens over whatever the implementation stores."""

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q: [HQ, T, D] and k, v: [H, T, D] of the block, after RoPE; returns o [HQ, T, D]."""


@dataclass(frozen=True)
class ModelShape:
    """What attention needs to know of a model."""

    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    softmax_scale: float

    @classmethod
    def of(cls, config: Any) -> ModelShape:
        """Shape of a transformers Llama configuration."""
        return cls(
            config.num_hidden_layers,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            config.head_dim**-0.5,
        )


class BlockModel:
    """A causal language model in float32 that forwards blocks and leaves the KV cache to `BlockAttention`."""

    def __init__(self, folder: Path) -> None:
        AttentionInterface.register(IMPLEMENTATION, _attend)
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation=IMPLEMENTATION
        ).eval()
        self.shape = ModelShape.of(self.model.config)

    @torch.inference_mode()
    def hidden(self, tokens: torch.Tensor, start: int, attention: BlockAttention) -> torch.Tensor:
        """Final hidden states [T, hidden] of `tokens` ([T]) at positions from `start`."""
        positions = torch.arange(start, start + len(tokens))[None]
        output = self.model.model(
            input_ids=tokens[None], position_ids=positions, use_cache=False, block_attention=attention
        )
        return output.last_hidden_state[0]

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Next-token logits [T, V] of hidden states."""
        return functional.linear(hidden, self.model.lm_head.weight)


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    block_attention: BlockAttention,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    o = block_attention.attend(module.layer_idx, query[0], key[0], value[0])
    return o.transpose(0, 1)[None], None
