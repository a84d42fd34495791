"""`hardkv eval` against real servers, compressing or not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from e2e.compressed import EXACT, LOGPROB_TOLERANCE, SHORT, STOCK, STRICT

from hardkv_sglang.cli.main import main
from hardkv_sglang.server_process import ServerProcess as Server

ServerFor = Callable[..., Server]

PROMPT = "The lighthouse keeper wrote into his book every evening. This is what he wrote:"


def evaluate(server: Server, folder: Path, num_tokens: int) -> dict[str, Any]:
    """Result of the command for one prompt, as JSON."""
    prompts, out = folder / "prompts.txt", folder / "report.json"
    prompts.write_text(PROMPT + "\n")
    command = ["eval", "--url", server.url, "--prompts", str(prompts), "--tokens", str(num_tokens), "--out", str(out)]
    assert main(command) == 0
    return json.loads(out.read_text())


def test_eval_sees_compression(server_for: ServerFor, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = evaluate(server_for(SHORT, STRICT), tmp_path, 260)
    assert report["select_events"] >= 3
    assert report["tokens"] == report["prompts"][0]["output_tokens"] == 260
    assert report["max_difference"] > 0.01
    assert 0.5 < report["agreement"] <= 1.0
    assert "top-1 agreement" in capsys.readouterr().out


def test_eval_of_exact_compression_is_zero(server_for: ServerFor, tmp_path: Path) -> None:
    report = evaluate(server_for(EXACT, STRICT), tmp_path, 200)
    assert report["select_events"] >= 2
    assert report["max_difference"] < LOGPROB_TOLERANCE
    assert report["agreement"] >= 0.99


def test_eval_of_a_stock_server(server_for: ServerFor, tmp_path: Path) -> None:
    report = evaluate(server_for(STOCK, STRICT), tmp_path, 40)
    assert report["select_events"] is None
    assert report["kl"] == pytest.approx(0.0, abs=LOGPROB_TOLERANCE)
    assert report["max_difference"] < LOGPROB_TOLERANCE


def test_eval_says_when_nothing_answers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--url", "http://127.0.0.1:9", "--tokens", "1"]) == 2
    assert "http://127.0.0.1:9" in capsys.readouterr().err


def test_eval_refuses_an_empty_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty"
    empty.write_text("\n")
    assert main(["eval", "--url", "http://127.0.0.1:9", "--text", str(empty)]) == 2
    assert "no prompt" in capsys.readouterr().err
