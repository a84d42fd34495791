"""`hardkv eval` against real servers, compressing or not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from e2e.compressed import LOGPROB_TOLERANCE, SHORT, STOCK, STRICT, evaluate, whole_model

from hardkv_sglang.cli.server_process import ServerProcess as Server

ServerFor = Callable[..., Server]
pytestmark = whole_model


def test_eval_sees_compression(server_for: ServerFor, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = evaluate(server_for(SHORT, STRICT), tmp_path, 260)
    assert report["select_events"] >= 3
    assert report["tokens"] == report["prompts"][0]["output_tokens"] == 260
    assert report["max_difference"] > 0.01
    assert 0.5 < report["agreement"] <= 1.0
    assert 0.0 < report["held"] < 1.0
    assert [step["token"] for step in report["kl_by_position"]] == [0, 128, 256]
    assert "top-1 agreement" in capsys.readouterr().out


def test_eval_of_a_stock_server(server_for: ServerFor, tmp_path: Path) -> None:
    report = evaluate(server_for(STOCK, STRICT), tmp_path, 40)
    assert report["select_events"] is None
    assert report["held"] is None
    assert report["kl"] == pytest.approx(0.0, abs=LOGPROB_TOLERANCE)
    assert report["max_difference"] < LOGPROB_TOLERANCE
