"""The serving benchmark end to end: its smoke preset on real servers. What is checked is the report, not speed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from e2e.server import DEFAULT_ENV

from bench.serving.__main__ import main
from bench.serving.presets import SMOKE


@pytest.mark.e2e
@pytest.mark.cpu
def test_smoke_preset(
    demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in DEFAULT_ENV.items():
        monkeypatch.setenv(name, value)
    work, pictures = tmp_path / "work", tmp_path / "img"
    words = ["--preset", "smoke", "--work", str(work), "--results", str(tmp_path), "--pictures", str(pictures)]
    assert main(words) == 0
    report = json.loads((tmp_path / "serving_smoke.json").read_text())
    rows = {(row["workload"], row["system"]): row for row in report["rows"]}
    assert list(rows) == [(load.name, system) for load in SMOKE.workloads for system in SMOKE.systems]
    for row in rows.values():
        figures = row["figures"]
        assert figures["output_tokens"] == row["requests"] * (256 if row["workload"] == "long" else 16)
        assert figures["output_tokens_per_second"] > 0 and figures["ttft_p50_ms"] > 0 and figures["tpot_p99_ms"] > 0
        assert 0 < figures["peak_tokens"] <= SMOKE.pool_tokens
        assert 0 < figures["running_mean"] <= figures["running_max"] <= row["clients"]
    stock, ours = rows["long", "stock-same-flags"]["figures"], rows["long", "hardkv"]["figures"]
    assert stock["select_events"] is None
    assert ours["select_events"] > 0 and ours["condense_events"] > 0 and 0 < ours["kept_fraction"] < 1
    # the pool holds three and a half dense requests
    assert ours["retractions"] <= stock["retractions"]
    assert report["run"]["layers"] == SMOKE.layers
    assert all(system["resolved"]["page_size"] == 32 for system in report["systems"].values())
    assert {path.name for path in pictures.iterdir()} == {"serving_smoke_throughput.png", "serving_smoke_time.png"}
    assert "8 clients, round 1" in capsys.readouterr().out
    # everything is remembered: nothing starts again
    assert main([*words, "--time-limit", "0"]) == 0
