"""Options that cannot work stop the server before anything is loaded, with a message that names the remedy; an SGLang
that nobody has reviewed gets a warning."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from e2e.compressed import SHORT_INTERVALS, STOCK, TWO_LAYERS, compressed, decode, prompt_ids, report_of
from e2e.server import DEFAULT_ENV, DEFAULT_FLAGS, ServerPool

from hardkv_sglang.cli.server_process import ServerProcess
from hardkv_sglang.engine.reviewed_sources import NEWEST, OLDEST

LATENT_ATTENTION = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 64,
    "q_lora_rank": 64,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
    "n_routed_experts": 2,
    "first_k_dense_replace": 2,
    "vocab_size": 1024,
    "max_position_embeddings": 512,
}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"kv-compression-config": '{"top_p": 1.5}'}, r"top_p=1.5 is out of range: 0.01 .. 1"),
        ({"page-size": 1}, "--page-size"),
        ({"enable-mixed-chunk": True}, "--enable-mixed-chunk"),
    ],
)
def test_refusal(server_pool: ServerPool, flags: dict[str, Any], message: str) -> None:
    server = server_pool.launch({**STOCK, "kv-compression": "hardkv", **flags}, {})
    assert server.wait_exit() != 0
    assert message in server.log_text()
    server.stop()


def test_a_model_with_latent_attention(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LATENT_ATTENTION))
    flags = {"load-format": "dummy", "skip-tokenizer-init": True, "kv-compression": "hardkv"}
    server = ServerProcess(tmp_path, {**DEFAULT_FLAGS, **flags}, DEFAULT_ENV, tmp_path / "server.log")
    assert server.wait_exit() != 0
    assert "multi-head latent attention (MLA)" in server.log_text()
    server.stop()


def test_a_release_that_nobody_has_reviewed(server_pool: ServerPool, unreviewed_release: Path) -> None:
    path = os.pathsep.join(filter(None, (str(unreviewed_release), os.environ.get("PYTHONPATH"))))
    server = server_pool.launch({**compressed(SHORT_INTERVALS), **TWO_LAYERS}, {"PYTHONPATH": path})
    try:
        server.wait_ready()
        (warning,) = [line for line in server.log_text().splitlines() if "was not reviewed" in line]
        assert f"HARD-KV: sglang {unreviewed_release.name} was not reviewed; {OLDEST} to {NEWEST} were" in warning
        assert "docs/design.md" in warning
        decode(server, prompt_ids(40, seed=1), 200, rid="unreviewed")
        assert report_of(server, "unreviewed")["select_events"] > 0
    finally:
        server.stop()
