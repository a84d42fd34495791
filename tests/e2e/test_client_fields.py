"""Whatever clients put into the fields that we read: the server goes on, and answers as stock or names our field."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import requests
from e2e.compressed import FAST, STRICT, fewer_layers, prompt_ids

from hardkv_sglang.cli.server_process import ServerProcess as Server

ServerFor = Callable[..., Server]
pytestmark = fewer_layers


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


# stock answers all of these
FOREIGN: list[Any] = [
    [1], [], "none", "", 7, 0, -1.5, True, False, None, {}, [["kv_compression", "none"]], {"": None}, {"__req__": 1},
    {"a": nested(200)}, {str(i): i for i in range(20_000)}, {"key": "x" * 1_000_000}, {"x" * 1_000_000: 1},
    {"compression": "off", "thinking_budget": "y"},
]  # fmt: skip
MALFORMED: list[Any] = [
    "off", "None", "", 1, True, None, [], ["none"], {"none": "none"}, nested(200), "x" * 5_000_000,
    {str(i): [i] * 10 for i in range(10_000)},
]  # fmt: skip


def ask(server: Server, custom_params: Any, **payload: Any) -> requests.Response:
    sampling = {"max_new_tokens": 3, "temperature": 0, "custom_params": custom_params}
    body = {"input_ids": prompt_ids(40, seed=500), "sampling_params": sampling, **payload}
    return requests.post(f"{server.url}/generate", json=body, timeout=300)


@pytest.fixture
def server(server_for: ServerFor) -> Server:
    return server_for(FAST, STRICT)


def test_parameters_of_others_are_left_alone(server: Server) -> None:
    for value in FOREIGN:
        reply = ask(server, value)
        assert reply.status_code == 200, (repr(value)[:80], reply.text[:300])
        assert reply.json()["meta_info"]["completion_tokens"] == 3
    server.check_idle()


@pytest.mark.parametrize("payload", [{}, {"return_logprob": True, "logprob_start_len": 3}], ids=["plain", "logprobs"])
def test_malformed_override_is_refused_by_its_name(server: Server, payload: dict[str, Any]) -> None:
    logged = len(server.log_text())
    for value in MALFORMED:
        reply = ask(server, {"kv_compression": value}, **payload)
        assert reply.status_code == 400, reply.text[:300]
        assert "custom_params['kv_compression']" in reply.text
        assert len(reply.text) < 1000
    server.check_idle()
    assert len(server.log_text()) - logged < 50_000


@pytest.mark.parametrize("key", ["kv_compresion", "kv-compression", "KV_COMPRESSION", "kvCompression"])
def test_misspelt_override_is_refused_by_its_name(server: Server, key: str) -> None:
    reply = ask(server, {"mine": 1, key: "none"})
    assert reply.status_code == 400
    assert key in reply.text
    assert "kv_compression" in reply.text
    server.check_idle()
