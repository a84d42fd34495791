"""Model folders that carry a shape and no weights, for `--load-format dummy`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Shape:
    """Shape of a Qwen3 model."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int = 128
    vocab_size: int = 151936


SHAPES = {
    "qwen3-8b": Shape(36, 4096, 12288, 32, 8),
    "qwen3-1.7b": Shape(28, 2048, 6144, 16, 8),
    # small enough to try the path of the others on a CPU
    "qwen3-tiny": Shape(2, 256, 512, 4, 2, head_dim=64),
}


def write_model(shape: Shape, folder: Path) -> Path:
    """Write the folder of a model of that shape and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "num_hidden_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_attention_heads": shape.num_q_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text("{}")
    return folder


def write_tokenizer(vocab_size: int, folder: Path) -> None:
    """Write a tokenizer of `vocab_size` words, `t3 t4 ...`, which encodes what it decodes to exactly the same ids.

    For servers and clients that insist on text: weights that are not trained generate any id, and the tokenizer of
    another model decodes those that it does not know to nothing.
    """
    special = {name: f"<{name}>" for name in ("unk", "bos", "eos")}
    words = [*special.values(), *(f"t{i}" for i in range(len(special), vocab_size))]
    model = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=special["unk"])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {f"{name}_token": word for name, word in special.items()}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
