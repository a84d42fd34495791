"""The soak runs, sends every kind of request, and finds nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from e2e.compressed import STRICT, TINY, two_layers

from bench.soak.__main__ import main
from hardkv_sglang.cli.server_process import ServerProcess as Server

pytestmark = two_layers


def test_soak_for_a_moment(server_for: Callable[..., Server], tmp_path: Path) -> None:
    server, out = server_for(TINY, STRICT), tmp_path / "soak.json"
    words = ["--url", server.url, "--minutes", "0.2", "--clients", "4", "--max-output", "240", "--without", "priority"]
    assert main([*words, "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["passed"]
    assert result["requests"] == sum(result["ends"].values()) > 0
    server.check_idle()
