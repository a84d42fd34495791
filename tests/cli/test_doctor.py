"""`hardkv doctor` prints a line per finding and ends with what it means."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hardkv_sglang.cli.main import main
from hardkv_sglang.engine.reviewed_sources import installed_release


def test_environment_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    *lines, verdict = capsys.readouterr().out.splitlines()
    assert verdict == "a server would start"
    assert all(line.split()[0] in ("ok", "warn") for line in lines)
    assert any(f"sglang: {installed_release()}" in line for line in lines)


def test_refusal_as_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_PLUGINS", "other")
    # flags are not looked at in an environment that cannot start anything
    assert main(["doctor", "--json", "--model-path", "nowhere", "--page-size", "1"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["would_start"] is False
    (refused,) = [finding for finding in report["findings"] if finding["status"] == "refused"]
    assert refused["subject"] == "plugin"
    assert "SGLANG_PLUGINS" in refused["remedy"]


def test_a_release_that_nobody_has_reviewed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, unreviewed_release: Path
) -> None:
    monkeypatch.syspath_prepend(str(unreviewed_release))
    assert main(["doctor"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if " sglang: " in line]
    assert line.startswith("warn") and f"{unreviewed_release.name}, wanted" in line and "pip install 'sglang" in line


def test_other_commands_take_no_unknown_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["model", "--page-size", "32"])
    assert "--page-size" in capsys.readouterr().err
