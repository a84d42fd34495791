"""Sends hostile requests to a server and asks whether it has taken any harm."""

from __future__ import annotations

import json
import time
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as Late
from typing import Any

import requests
from e2e.compressed import prompt_ids
from e2e.hostile_cases import Case
from e2e.hostile_fields import SERVED_MODEL

from hardkv_sglang.cli.server_process import ServerProcess as Server

PATIENCE_S = 1.5  # then everything that runs is aborted: some cases ask for thousands of tokens
ANSWER_TIMEOUT_S = 120.0
ABORTED_STATUS = 499
PROBE = {
    "input_ids": prompt_ids(20, seed=99),
    "sampling_params": {"temperature": 0, "max_new_tokens": 2, "ignore_eos": True},
}
NEIGHBOUR_PROMPT, NEIGHBOUR_TOKENS = prompt_ids(64, seed=98), 70  # until after its first event
EXACT_TOKENS = 60  # before any event, whatever runs beside it
GENERATING = ("/generate", "/v1/")


def send(server: Server, case: Case) -> str:
    """What came back: the status code, and what a stream or a finished request says of an error.

    Requests that take too long are aborted; pauses and released memory are taken back.
    """
    with ThreadPoolExecutor(1) as executor:
        future = executor.submit(_post, server, case)
        answer = _await(server, future)
    if not case.path.startswith(GENERATING):
        _recover(server, case)
    return answer


def _post(server: Server, case: Case) -> str:
    try:
        reply = requests.post(
            server.url + case.path,
            data=case.body.replace(SERVED_MODEL, str(server.model)).encode(),
            headers={"content-type": "application/json"},
            timeout=ANSWER_TIMEOUT_S,
        )
    except requests.RequestException as error:
        return type(error).__name__
    if case.path.startswith("/flush_cache") and reply.status_code in (200, 400):
        return "200 or 400"  # whether anything ran just then
    return f"{reply.status_code}{_error_inside(reply.text)}"


def _error_inside(text: str) -> str:
    """The error that a stream ends with, if any: its status code came before."""
    for line in text.splitlines():
        if line.startswith('data: {"error"'):
            error: Any = json.loads(line.removeprefix("data: "))["error"]
            return f", then {error['code']}" if isinstance(error, dict) else ", then an error"
    return ""


def _await(server: Server, future: Future[str]) -> str:
    try:
        return future.result(PATIENCE_S)
    except Late:
        pass
    while not future.done():
        control(server, "/abort_request", {"abort_all": True})
        time.sleep(0.2)
    return future.result()


def _recover(server: Server, case: Case) -> None:
    control(server, "/continue_generation", {})
    if case.path == "/release_memory_occupation":
        # the same tags: SGLang ends when it shall resume what was not released
        _post(server, Case("/resume_memory_occupation", case.body, ()))


def control(server: Server, path: str, body: Any) -> int | None:
    """Status code of a well-formed control request; None when nobody answers."""
    try:
        return requests.post(server.url + path, json=body, timeout=30).status_code
    except requests.RequestException:
        return None


def neighbour(server: Server) -> list[int] | None:
    """Tokens of a well-behaved request; None if it was aborted. Raises `AssertionError` if it got anything else."""
    sampling = {"temperature": 0, "max_new_tokens": NEIGHBOUR_TOKENS, "ignore_eos": True}
    body = {"input_ids": NEIGHBOUR_PROMPT, "sampling_params": sampling}
    reply = requests.post(f"{server.url}/generate", json=body, timeout=ANSWER_TIMEOUT_S)
    if reply.status_code == ABORTED_STATUS:
        return None
    assert reply.status_code == 200, reply.text[:500]
    tokens: list[int] = reply.json()["output_ids"]
    if reply.json()["meta_info"]["finish_reason"]["type"] == "abort":
        return None
    assert len(tokens) == NEIGHBOUR_TOKENS, f"{len(tokens)} tokens of {NEIGHBOUR_TOKENS}"
    return tokens[:EXACT_TOKENS]


def probe(server: Server, timeout_s: float = 60.0) -> list[int]:
    """Tokens of a fixed greedy request once nothing runs and no token of the pool is held.

    Raises `AssertionError` if the server stays busy, holds tokens, or does not answer.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        load = requests.get(f"{server.url}/v1/loads", timeout=30).json()["loads"][0]
        held = {name: load[name] for name in ("num_running_reqs", "num_waiting_reqs", "num_used_tokens") if load[name]}
        if not held:
            break
        assert time.monotonic() < deadline, f"still held: {held}"
        time.sleep(0.02)
    reply = requests.post(f"{server.url}/generate", json=PROBE, timeout=timeout_s)
    assert reply.status_code == 200, reply.text[:500]
    tokens: list[int] = reply.json()["output_ids"]
    return tokens
