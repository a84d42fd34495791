"""The programs in `examples/` as a user runs them, and the dashboard's series on the `/metrics` of a real server."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import requests
from e2e.compressed import SHORT, SHORT_INTERVALS, STRICT, hardkv_state, whole_model
from e2e.server import DEFAULT_ENV, DEVICE_FLAGS

from hardkv_sglang.cli.server_process import ServerProcess as Server

pytestmark = whole_model
EXAMPLES = Path(__file__).parents[2] / "examples"
DASHBOARD = EXAMPLES / "monitoring" / "grafana" / "dashboards" / "hardkv.json"
# exported once there is something to count, which no test here makes happen
ONLY_WHEN_IT_HAPPENS = {"sglang:num_retracted_requests_total"}


@pytest.fixture
def server(server_for: Callable[..., Server]) -> Server:
    return server_for(SHORT, STRICT)


def run_example(name: str, *arguments: str) -> str:
    """Output of an example, with as many threads as the servers have."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        env={**os.environ, **DEFAULT_ENV}, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_openai_client(server: Server) -> None:
    output = run_example("openai_client.py", "--url", server.url, "--tokens", "260")
    lines = re.findall(r"--- (\d+) tokens, (\d+) condense events, (-?\d+) token pages given back", output)
    (compressed, dense) = [tuple(map(int, line)) for line in lines]
    assert compressed[1] >= 1
    assert compressed[2] >= 1
    assert dense[1:] == (0, 0)
    assert min(compressed[0], dense[0]) > 200
    server.check_idle()


def test_frontend_program(server: Server) -> None:
    before = hardkv_state(server)["select_events"]
    output = run_example("frontend_program.py", "--url", server.url, "--tokens", "120")
    _, draft, recipe, advertisement = re.split(r"^--- (?:draft|recipe|advertisement)\n", output, flags=re.MULTILINE)
    assert len({draft, recipe, advertisement}) == 3
    assert min(map(len, (draft, recipe, advertisement))) > 120  # a character a token, at least
    assert hardkv_state(server)["select_events"] > before
    server.check_idle()


def test_engine_in_process(demo_model: Path) -> None:
    output = run_example(
        "engine_in_process.py",
        *("--model", str(demo_model), "--dtype", DEVICE_FLAGS["dtype"]),
        *("--tokens", "200", "--config", json.dumps(SHORT_INTERVALS)),
    )
    (figures,) = re.findall(r"(\d+) select and (\d+) condense events; (\d+) token pages given back", output)
    assert min(map(int, figures)) >= 1


def test_dashboard_finds_its_series(server: Server) -> None:
    text = requests.get(f"{server.url}/metrics", timeout=60).text
    exported = set(re.findall(r"^((?:hardkv_|sglang:)\w+)\{", text, re.MULTILINE))
    panels = json.loads(DASHBOARD.read_text())["panels"]
    expressions = "\n".join(target["expr"] for panel in panels for target in panel["targets"])
    assert set(re.findall(r"\b(?:hardkv_|sglang:)\w+", expressions)) - exported - ONLY_WHEN_IT_HAPPENS == set()
