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
        """Shape of a transformers configuration of the Llama kind (Llama, Qwen2, Qwen3, Mistral)."""
        num_heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
        return cls(config.num_hidden_layers, num_heads, config.num_key_value_heads, head_dim, head_dim**-0.5)


class BlockModel:
    """A causal language model that forwards blocks and leaves the KV cache to `BlockAttention`.

    Weights and activations have type `dtype`; what attention gets, stores and returns is float32, and so are logits.
    """

    def __init__(self, folder: Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        AttentionInterface.register(IMPLEMENTATION, _attend)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=IMPLEMENTATION)
        self.device = torch.device(device)
        self.model = model.eval().to(self.device)
        self.shape = ModelShape.of(self.model.config)

    @property
    def rope_frequencies(self) -> torch.Tensor:
        """Radians per position of each pair of channels, [D / 2]."""
        return self.model.model.rotary_emb.inv_freq

    @torch.inference_mode()
    def hidden(self, tokens: torch.Tensor, start: int, attention: BlockAttention) -> torch.Tensor:
        """Final hidden states [T, hidden] of `tokens` ([T]) at positions from `start`."""
        positions = torch.arange(start, start + len(tokens), device=self.device)[None]
        output = self.model.model(
            input_ids=tokens[None].to(self.device),
            position_ids=positions,
            use_cache=False,
            block_attention=attention,
        )
        return output.last_hidden_state[0]

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Next-token logits [T, V] of hidden states, float32."""
        return functional.linear(hidden, self.model.lm_head.weight).float()


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    block_attention: BlockAttention,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    o = block_attention.attend(module.layer_idx, query[0].float(), key[0].float(), value[0].float())
    return o.transpose(0, 1)[None].to(query.dtype), None
