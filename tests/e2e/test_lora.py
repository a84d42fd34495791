"""LoRA adapters and compression on one server: requests of an adapter and of the base model in one batch."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from e2e.compressed import (
    FIRST_EVENT,
    SHORT_INTERVALS,
    STOCK,
    STRICT,
    TWO_LAYERS,
    compressed,
    decode,
    fresh_rid,
    prompt_ids,
    report_of,
    two_layers,
)  # fmt: skip
from e2e.server import ServerPool
from safetensors.torch import save_file

pytestmark = two_layers
RANK, NUM_LAYERS, NUM_TOKENS = 8, 2, 160


@pytest.fixture(scope="module")
def adapter(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random adapter of the Q and V projections, in the format of peft."""
    folder, g = tmp_path_factory.mktemp("adapter"), torch.Generator().manual_seed(0)
    model = json.loads((demo_model / "config.json").read_text())
    hidden, head_dim = model["hidden_size"], model["hidden_size"] // model["num_attention_heads"]
    outputs = {"q_proj": hidden, "v_proj": head_dim * model["num_key_value_heads"]}
    weights = {}
    for layer in range(NUM_LAYERS):
        for name, size in outputs.items():
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{prefix}.lora_A.weight"] = 0.05 * torch.randn(RANK, hidden, generator=g)
            weights[f"{prefix}.lora_B.weight"] = 0.5 * torch.randn(size, RANK, generator=g)
    save_file(weights, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 16, "target_modules": list(outputs), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_adapter_and_base_model(server_pool: ServerPool, adapter: Path) -> None:
    flags: dict[str, Any] = {**TWO_LAYERS, "enable-lora": True, "lora-paths": f"tone={adapter}"}
    prompt = prompt_ids(40, seed=900)
    stock = server_pool.get({**STOCK, **flags}, STRICT)
    dense = {name: decode(stock, prompt, FIRST_EVENT, lora_path=name)["output_ids"] for name in (None, "tone")}
    assert dense[None] != dense["tone"]
    server = server_pool.get({**compressed(SHORT_INTERVALS), **flags}, STRICT)
    server.flush_cache()
    jobs = [(name, fresh_rid()) for name in (None, "tone", None, "tone")]
    with ThreadPoolExecutor(len(jobs)) as executor:
        replies = list(executor.map(lambda j: decode(server, prompt, NUM_TOKENS, lora_path=j[0], rid=j[1]), jobs))
    for (name, rid), reply in zip(jobs, replies, strict=True):
        assert reply["output_ids"][:FIRST_EVENT] == dense[name]
        assert len(reply["output_ids"]) == NUM_TOKENS
        assert report_of(server, rid)["condense_events"] >= 1
    server.check_idle()
