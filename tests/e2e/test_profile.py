"""`/start_profile` and `/stop_profile` leave a trace, and the server alive."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests
from e2e.compressed import FEWER_LAYERS, SHORT_INTERVALS, STRICT, compressed, fewer_layers

from hardkv_sglang.cli.server_process import ServerProcess as Server

pytestmark = fewer_layers
TRACE_TIMEOUT_S = 300.0


@pytest.fixture
def server(server_for: Callable[..., Server]) -> Server:
    return server_for({**compressed(SHORT_INTERVALS), **FEWER_LAYERS}, STRICT)


def post(server: Server, path: str, **options: Any) -> None:
    assert requests.post(server.url + path, json=options, timeout=TRACE_TIMEOUT_S).status_code == 200


def events_of(folder: Path) -> list[dict[str, Any]]:
    """Events of the only trace in a folder, once it is complete."""
    deadline = time.monotonic() + TRACE_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            (trace,) = folder.glob("*.trace.json.gz")
            return json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
        except (ValueError, EOFError):
            time.sleep(0.5)
    raise TimeoutError(f"no complete trace in {folder}")


@pytest.mark.parametrize("activities", [["CPU"], ["CPU", "GPU"], None], ids=str)
def test_started_and_stopped(server: Server, tmp_path: Path, activities: list[str] | None) -> None:
    post(server, "/start_profile", output_dir=str(tmp_path), activities=activities)
    server.generate(text="x", sampling_params={"max_new_tokens": 4})
    post(server, "/stop_profile")
    assert any("aten::" in event.get("name", "") for event in events_of(tmp_path))
    server.check_idle()


def test_a_number_of_steps(server: Server, tmp_path: Path) -> None:
    post(server, "/start_profile", output_dir=str(tmp_path), activities=["CPU"], num_steps=3)
    server.generate(text="x", sampling_params={"max_new_tokens": 8, "ignore_eos": True})
    assert events_of(tmp_path)
    server.check_idle()
