"""Clients keep working: OpenAI SDK, SGLang frontend programs, Engine, raw /generate, per-request opt-out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from e2e.compressed import (
    SHORT,
    SHORT_INTERVALS,
    STRICT,
    decode,
    fresh_rid,
    hardkv_state,
    prompt_ids,
    report_of,
    whole_model,
)
from e2e.server import DEFAULT_ENV, DEVICE_FLAGS

from hardkv_sglang.cli.server_process import ServerProcess as Server

ServerFor = Callable[..., Server]
pytestmark = whole_model
MESSAGES: list[Any] = [{"role": "user", "content": "Count from one to one hundred, in words."}]
LONG: dict[str, Any] = {"model": "default", "temperature": 0, "extra_body": {"ignore_eos": True}}


@pytest.fixture
def server(server_for: ServerFor) -> Server:
    return server_for(SHORT, STRICT)


def test_chat_streaming_equals_blocking(server: Server) -> None:
    chat: Any = server.client().chat.completions
    request = {**LONG, "messages": MESSAGES, "max_tokens": 200}
    events = hardkv_state(server)["condense_events"]
    pieces = [chunk.choices[0].delta.content or "" for chunk in chat.create(**request, stream=True)]
    assert len(pieces) > 50
    assert hardkv_state(server)["condense_events"] > events
    assert "".join(pieces) == chat.create(**request).choices[0].message.content


def test_parallel_samples_and_logprobs(server: Server) -> None:
    reply = server.client().completions.create(
        model="default", prompt="The history of bread began", max_tokens=150, n=2, logprobs=2,
        temperature=0.8, extra_body={"ignore_eos": True},
    )  # fmt: skip
    assert len(reply.choices) == 2
    assert reply.choices[0].text != reply.choices[1].text
    for choice in reply.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.token_logprobs is not None
        assert len(choice.logprobs.token_logprobs) == 150


def test_stop_string(server: Server) -> None:
    prompt, rid = prompt_ids(40, seed=61), fresh_rid()
    text = decode(server, prompt, 220)["text"]
    # ten characters that come up late, after events
    stop = next(text[i : i + 10] for i in range(len(text) // 2, len(text) - 10) if text.find(text[i : i + 10]) == i)
    server.flush_cache()  # a cached prompt is rounded differently, and the text may be another
    reply = decode(server, prompt, 400, rid=rid, sampling={"stop": [stop]})
    assert reply["meta_info"]["finish_reason"]["type"] == "stop"
    assert report_of(server, rid)["select_events"] >= 1
    server.check_idle()


FRONTEND_PROGRAM = """
import json, sys
import sglang as sgl

@sgl.function
def program(s):
    s += "The quick brown fox " * 12
    s += sgl.gen("first", max_tokens=120, temperature=0, ignore_eos=True)
    forks = s.fork(2)
    for i, fork in enumerate(forks):
        fork += f" Option {i}:" + sgl.gen("option", max_tokens=100, temperature=0, ignore_eos=True)
    s += forks[0]["option"] + forks[1]["option"]

sgl.set_default_backend(sgl.RuntimeEndpoint(sys.argv[1]))
state = program.run()
print("RESULT" + json.dumps([state["first"], state.text()]))
"""


def test_frontend_program_with_fork(server: Server) -> None:
    output = run_python("-c", FRONTEND_PROGRAM, server.url)
    first, text = json.loads(output.split("RESULT")[1])
    assert first in text
    assert "Option" not in first


ENGINE_PROGRAM = """
import json, sys
import sglang as sgl

if __name__ == "__main__":
    engine = sgl.Engine(
        model_path=sys.argv[1], max_total_tokens=2560, max_running_requests=4, random_seed=0,
        kv_compression="hardkv", kv_compression_config=json.loads(sys.argv[2]), **json.loads(sys.argv[4]),
    )
    sampling = {"temperature": 0, "max_new_tokens": 200, "ignore_eos": True}
    reply = engine.generate(input_ids=json.loads(sys.argv[3]), sampling_params=sampling)
    state = engine.get_server_info()["internal_states"][0]["hardkv"]
    engine.shutdown()
    print("RESULT" + json.dumps([reply["output_ids"], state["condense_events"]]))
"""


def test_engine_equals_server(server: Server, demo_model: Path, tmp_path: Path) -> None:
    prompt = prompt_ids(40, seed=80)
    script = tmp_path / "engine.py"
    script.write_text(ENGINE_PROGRAM)
    device = {name.replace("-", "_"): value for name, value in DEVICE_FLAGS.items()}
    words = [str(demo_model), *(json.dumps(x) for x in (SHORT_INTERVALS, prompt, device))]
    output = run_python(str(script), *words)
    ids, condense_events = json.loads(output.split("RESULT")[1])
    assert condense_events >= 1
    sampling = {"temperature": 0, "max_new_tokens": 200, "ignore_eos": True}
    assert ids == server.generate(input_ids=prompt, sampling_params=sampling)["output_ids"]


def test_opt_out(server: Server) -> None:
    before = hardkv_state(server)
    reply = server.client().completions.create(
        model="default", prompt=prompt_ids(40, seed=81), max_tokens=150, temperature=0,
        extra_body={"ignore_eos": True, "custom_params": {"kv_compression": "none"}},
    )  # fmt: skip
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 150
    assert hardkv_state(server)["select_events"] == before["select_events"]


@pytest.mark.parametrize("value", ["off", 1, None, ["none"]])
def test_malformed_override_is_refused_and_the_server_lives(server: Server, value: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="kv_compression"):
        server.client().chat.completions.create(
            model="default", messages=MESSAGES, max_tokens=8,
            extra_body={"custom_params": {"kv_compression": value}},
        )  # fmt: skip
    server.check_idle()


def run_python(*arguments: str) -> str:
    """Output of a client program, with as many threads as the servers have."""
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **DEFAULT_ENV}, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
