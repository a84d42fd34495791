"""`hardkv eval` says what is wrong where it cannot start."""

from __future__ import annotations

from pathlib import Path

import pytest

from hardkv_sglang.cli.main import main


def test_eval_says_when_nothing_answers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--url", "http://127.0.0.1:9", "--tokens", "1"]) == 2
    assert "http://127.0.0.1:9" in capsys.readouterr().err


def test_eval_refuses_an_empty_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty"
    empty.write_text("\n")
    assert main(["eval", "--url", "http://127.0.0.1:9", "--text", str(empty)]) == 2
    assert "no prompt" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{}", "[1, 2]", '[["a"]]', "[[]]", "no JSON"])
def test_eval_refuses_json_that_is_no_list_of_prompts(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "prompts.json"
    path.write_text(content)
    assert main(["eval", "--url", "http://127.0.0.1:9", "--prompts", str(path)]) == 2
    assert str(path) in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--first", "16"], ["--first", "-1"], ["--concurrency", "0"]])
def test_eval_refuses_numbers_out_of_range(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--url", "http://127.0.0.1:9", "--tokens", "16", *options]) == 2
    assert options[0] in capsys.readouterr().err
