"""What SGLang may give the pool once compression has its share: by figures of a GPU that is not there."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.radix_attention import RadixAttention
from torch import nn

from hardkv_sglang.config import HardKVConfig
from hardkv_sglang.engine import compat
from hardkv_sglang.engine.memory_budget import left_for_pool

GB = 10**9
LAYERS, HEADS, DIM, PAGE = 36, 8, 128, 32
TOKEN = 2 * LAYERS * HEADS * DIM * 2  # bytes


@pytest.fixture(autouse=True)
def sglang_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's two rules, which need a server's context: whole pages, and a request per two tokens at least."""
    monkeypatch.setattr(compat, "pool_tokens", lambda _configurator, size: size // TOKEN // PAGE * PAGE)
    monkeypatch.setattr(compat, "most_requests", lambda configurator, tokens: min(configurator.asked, tokens // 2))
    monkeypatch.setattr(compat, "num_multiprocessors", lambda configurator: 132 * (configurator.device == "cuda"))


def configurator(requests: int, limit: int | None = None, device: str = "cuda") -> Any:
    """A Qwen3-8B shape."""
    layers = [RadixAttention(32, DIM, 0.1, num_kv_heads=HEADS, layer_id=i) for i in range(LAYERS)]
    return SimpleNamespace(
        device=device, asked=requests, page_size=PAGE, model_dtype=torch.bfloat16,
        kv_cache_dtype=torch.bfloat16, model=nn.Sequential(*layers),
        model_config=SimpleNamespace(context_len=40960),
        server_args=SimpleNamespace(
            max_total_tokens=limit, disable_radix_cache=False, enable_deterministic_inference=False
        ),
    )  # fmt: skip


def test_a_pool_that_sglang_sizes_gets_what_is_left(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        few, many = (left_for_pool(HardKVConfig(), configurator(n), 50 * GB) for n in (64, 128))
    assert not caplog.records
    assert 45 * GB < many < few < 50 * GB
    # tables and rings have a row per request
    assert 1.5 < (50 * GB - many) / (50 * GB - few) < 2.1


def test_a_large_share_is_said_with_figures_and_remedy(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert left_for_pool(HardKVConfig(), configurator(2048), 50 * GB) < 40 * GB
    assert "2048 requests" in caplog.text
    assert "--max-running-requests" in caplog.text


def test_tables_that_leave_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match=r"nothing is left.*tables .* GB.*rings.*--max-running-requests"):
        left_for_pool(HardKVConfig(max_tokens=None), configurator(2048), 10 * GB)


def test_a_fixed_pool_that_fits_only_without_tables_is_refused() -> None:
    limit = 50 * GB // TOKEN // PAGE * PAGE
    left = left_for_pool(HardKVConfig(), configurator(64), 50 * GB)
    with pytest.raises(ValueError, match=rf"--max-total-tokens {limit} .*: {left // TOKEN // PAGE * PAGE} tokens do"):
        left_for_pool(HardKVConfig(), configurator(64, limit), 50 * GB)
    # what the message says is true, and a limit above all memory is SGLang's to lower
    fits = left // TOKEN // PAGE * PAGE
    assert left_for_pool(HardKVConfig(), configurator(64, fits), 50 * GB) // TOKEN >= fits
    assert left_for_pool(HardKVConfig(), configurator(64, 2 * limit), 50 * GB) == left


def test_a_cpu_pool_that_the_operator_sized_is_left_alone() -> None:
    assert left_for_pool(HardKVConfig(), configurator(2048, 4096, "cpu"), GB) == GB
    assert left_for_pool(HardKVConfig(), configurator(64, None, "cpu"), 50 * GB) < 49.9 * GB
