"""Stock SGLang on this machine: what compression must not change, and what the other tests rely on."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from e2e.compressed import POOL_TOKENS, STOCK, STRICT, whole_model
from e2e.server import ServerPool

from hardkv_sglang.cli.server_process import ServerError
from hardkv_sglang.cli.server_process import ServerProcess as Server

pytestmark = whole_model
GREEDY = {"temperature": 0, "max_new_tokens": 16}
MESSAGES: list[Any] = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]


@pytest.fixture
def server(server_for: Callable[..., Server]) -> Server:
    return server_for(STOCK, STRICT)


def fresh_prompt(num_tokens: int) -> list[int]:
    # a first token that no other test uses keeps the prompt out of their radix prefixes
    first = 1000 + uuid.uuid4().int % 40000
    return [first, *range(2000, 2000 + num_tokens - 1)]


def test_chat_completion(server: Server) -> None:
    reply = server.client().chat.completions.create(model="default", messages=MESSAGES, temperature=0, max_tokens=16)
    assert "Paris" in (reply.choices[0].message.content or "")
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage is not None
    assert reply.usage.completion_tokens < 16


def test_chat_streaming_equals_blocking(server: Server) -> None:
    request: dict[str, Any] = {"model": "default", "messages": MESSAGES, "temperature": 0, "max_tokens": 16}
    chat: Any = server.client().chat.completions
    pieces = [chunk.choices[0].delta.content or "" for chunk in chat.create(**request, stream=True)]
    assert len(pieces) > 1
    assert "".join(pieces) == chat.create(**request).choices[0].message.content


def test_radix_cache_hits_whole_pages(server: Server) -> None:
    prompt = fresh_prompt(100)
    first = server.generate(input_ids=prompt, sampling_params=GREEDY)
    second = server.generate(input_ids=prompt, sampling_params=GREEDY)
    assert first["meta_info"]["cached_tokens"] == 0
    assert second["meta_info"]["cached_tokens"] == 96
    assert first["output_ids"] == second["output_ids"]


def test_flush_empties_the_radix_cache(server: Server) -> None:
    prompt = fresh_prompt(70)
    server.generate(input_ids=prompt, sampling_params=GREEDY)
    server.flush_cache()
    assert server.generate(input_ids=prompt, sampling_params=GREEDY)["meta_info"]["cached_tokens"] == 0


def test_abort_leaks_nothing(server: Server) -> None:
    rid = uuid.uuid4().hex
    endless = {"temperature": 0, "max_new_tokens": 2000, "ignore_eos": True}
    with ThreadPoolExecutor(1) as executor:
        reply = executor.submit(server.generate, input_ids=fresh_prompt(50), sampling_params=endless, rid=rid)
        wait_until_running(server)
        server.abort(rid)
        meta = reply.result()["meta_info"]
    assert meta["finish_reason"]["type"] == "abort"
    assert meta["completion_tokens"] < 2000
    server.check_idle()


def wait_until_running(server: Server) -> None:
    deadline = time.monotonic() + 60
    while server.num_requests() == 0:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_disconnect_leaks_nothing(server: Server) -> None:
    stream: Any = server.client().chat.completions.create(
        model="default",
        messages=MESSAGES,
        max_tokens=2000,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    stream.close()
    server.check_idle()


def test_server_info_reports_the_flags(server: Server) -> None:
    info = server.server_info()
    assert info["attention_backend"] == "torch_native"
    assert (info["page_size"], info["max_total_num_tokens"]) == (32, POOL_TOKENS)
    assert info["disable_overlap_schedule"] is False


def test_same_flags_share_one_server(server_for: Callable[..., Server]) -> None:
    assert server_for(STOCK, STRICT) is server_for(dict(STOCK), dict(STRICT))


def test_bad_flag_fails_with_the_log(server_pool: ServerPool) -> None:
    server = server_pool.launch({"no-such-flag": True}, {})
    assert server.wait_exit() != 0
    with pytest.raises(ServerError, match="unrecognized arguments: --no-such-flag"):
        server.check_alive()
    server.stop()


def test_stop_ends_every_process(server_pool: ServerPool) -> None:
    server = server_pool.launch({}, {})
    server.stop()
    server.stop()
    assert not server.is_alive
