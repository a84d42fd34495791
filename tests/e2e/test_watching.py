"""`hardkv top` and `hardkv doctor` beside a real server."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from e2e.compressed import FAST, STOCK, STRICT, decode, fewer_layers, hardkv_state, prompt_ids

from hardkv_sglang.cli.main import main
from hardkv_sglang.cli.server_process import ServerProcess as Server
from hardkv_sglang.cli.server_process import command_line

ServerFor = Callable[..., Server]
pytestmark = fewer_layers


def look(server: Server, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """One look of `hardkv top`."""
    capsys.readouterr()
    assert main(["top", "--url", server.url, "--once", "--json"]) == 0
    seen: dict[str, Any] = json.loads(capsys.readouterr().out)
    return seen


def looks_during(running: Future[Any], server: Server, capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """Looks until a request has ended."""
    looks = []
    while not running.done():
        looks.append(look(server, capsys))
    return looks


def test_top_sees_what_the_server_tells(server_for: ServerFor, capsys: pytest.CaptureFixture[str]) -> None:
    server = server_for(FAST, STRICT)
    before = look(server, capsys)
    with ThreadPoolExecutor(1) as executor:
        running = executor.submit(decode, server, prompt_ids(40, seed=400), 240)
        looks = looks_during(running, server, capsys)
    server.check_idle()
    after, state = look(server, capsys), hardkv_state(server)

    assert any(seen["running_requests"] == 1 and 0 < seen["used_tokens"] < seen["pool_tokens"] for seen in looks)
    assert any(0 < seen["kept_ratio"] < 1 for seen in looks)
    assert (after["running_requests"], after["waiting_requests"], after["used_tokens"]) == (0, 0, 0)
    assert after["pool_tokens"] == server.server_info()["max_total_num_tokens"]
    assert after["select_events"] == state["select_events"] > before["select_events"]
    assert after["freed_pages"] == state["freed_pages"] > before["freed_pages"]
    assert after["kept_fraction"] == pytest.approx(state["kept_fraction"])
    assert after["retracted_requests"] is not None


def test_top_names_a_server_without_compression(server_for: ServerFor, capsys: pytest.CaptureFixture[str]) -> None:
    server = server_for(STOCK, STRICT)
    assert main(["top", "--url", server.url, "--once"]) == 2
    assert "--kv-compression hardkv" in capsys.readouterr().err


def test_doctor_foretells_the_tables(server_for: ServerFor, demo_model: Path) -> None:
    server = server_for(FAST, STRICT)
    program = [sys.executable, "-m", "hardkv_sglang.cli.main", "doctor", "--json", "--model-path", str(demo_model)]
    done = subprocess.run([*program, *command_line(server.flags)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    findings = {finding["subject"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert findings["memory"]["values"] == {
        "pool_tokens": server.server_info()["max_total_num_tokens"],
        "table_bytes": hardkv_state(server)["table_bytes"],
    }
