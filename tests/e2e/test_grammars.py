"""Structured output on the default grammar backend, before, during and after compression events."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests
from e2e.compressed import FEWER_LAYERS, SHORT_INTERVALS, STOCK, STRICT, compressed, fewer_layers, fresh_rid, report_of

from hardkv_sglang.cli.server_process import ServerProcess as Server

pytestmark = fewer_layers

# each needs more tokens than the first event leaves alone: 64 past the prompt
NUM_TOKENS = 240
NUMBERS = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "minItems": 60, "maxItems": 60}
SCHEMA = {"type": "object", "properties": {"numbers": NUMBERS}, "required": ["numbers"], "additionalProperties": False}
CALL = re.compile(r"(yes|no)(-(yes|no))*-?(y|ye|n)?")
TAG = {
    "type": "structural_tag",
    "format": {
        "type": "triggered_tags",
        "triggers": ["<f"],
        "tags": [{"begin": "<f>", "content": {"type": "json_schema", "json_schema": SCHEMA}, "end": "</f>"}],
        "at_least_one": True,
    },
}


def is_numbers(text: str) -> bool:
    return len(json.loads(text)["numbers"]) == 60


GRAMMARS: dict[str, tuple[dict[str, str], Callable[[str], Any]]] = {
    "json_schema": ({"json_schema": json.dumps(SCHEMA)}, is_numbers),
    "regex": ({"regex": "(ab|cd){200}"}, re.compile("(ab|cd){50,200}[ac]?").fullmatch),
    "ebnf": ({"ebnf": 'root ::= ("yes" | "no") "-" root'}, CALL.fullmatch),
    "structural_tag": ({"structural_tag": json.dumps(TAG)}, lambda text: is_numbers(text[3:].partition("</f>")[0])),
}
MALFORMED = {
    "no json": {"json_schema": "{not json"},
    "no such type": {"json_schema": '{"type": "nonsense"}'},
    "no schema": {"json_schema": "7"},
    "open parenthesis": {"regex": "((("},
    "no such rule": {"ebnf": "root ::= nowhere"},
    "empty tag": {"structural_tag": "{}"},
    "list": {"structural_tag": "[]"},
    "wrong members": {"structural_tag": '{"structures": 7, "triggers": 3}'},
}


@pytest.fixture(params=["stock", "compressed"])
def server(request: pytest.FixtureRequest, server_for: Callable[..., Server]) -> Server:
    flags = STOCK if request.param == "stock" else compressed(SHORT_INTERVALS)
    return server_for({**flags, **FEWER_LAYERS}, STRICT)


def generate(server: Server, grammar: dict[str, str], **payload: Any) -> Any:
    sampling = {"temperature": 0.7, "max_new_tokens": NUM_TOKENS, **grammar, **payload.pop("sampling", {})}
    return server.generate(text="An answer: ", sampling_params=sampling, **payload)


def assert_compressed(server: Server, rid: str) -> None:
    if server.flags.get("kv-compression") == "hardkv":
        assert report_of(server, rid)["select_events"] >= 1


@pytest.mark.parametrize("name", GRAMMARS)
def test_one_request(server: Server, name: str) -> None:
    grammar, is_right = GRAMMARS[name]
    rid = fresh_rid()
    reply = generate(server, grammar, rid=rid)
    assert is_right(reply["text"])
    assert_compressed(server, rid)
    server.check_idle()


def test_all_at_once_with_a_request_that_has_none(server: Server) -> None:
    free = {"sampling": {"ignore_eos": True}}
    jobs = [*GRAMMARS.values(), ({}, lambda text: True), *GRAMMARS.values()]
    with ThreadPoolExecutor(len(jobs)) as executor:
        replies = list(executor.map(lambda job: generate(server, job[0], **({} if job[0] else free)), jobs))
    assert all(is_right(reply["text"]) for (_, is_right), reply in zip(jobs, replies, strict=True))
    server.check_idle()


def test_several_samples(server: Server) -> None:
    grammar, is_right = GRAMMARS["regex"]
    replies = generate(server, grammar, sampling={"n": 2})
    assert len(replies) == 2 and all(is_right(reply["text"]) for reply in replies)
    server.check_idle()


def test_streamed_chat(server: Server) -> None:
    schema: Any = {"type": "json_schema", "json_schema": {"name": "numbers", "schema": SCHEMA}}
    chunks = server.client().chat.completions.create(
        model="default",
        messages=[{"role": "user", "content": "Numbers, please."}],
        response_format=schema,
        max_tokens=NUM_TOKENS,
        stream=True,
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert len(pieces) > 1 and is_numbers("".join(pieces))
    server.check_idle()


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed(server: Server, name: str) -> None:
    payload = {"text": "x", "sampling_params": {"max_new_tokens": 4, **MALFORMED[name]}}
    for _ in range(2):  # the second finds the refusal in SGLang's cache
        reply = requests.post(f"{server.url}/generate", json=payload, timeout=600)
        assert reply.status_code == 400
        assert "Failed to compile" in reply.text
    server.check_idle()
