"""Priors files are complete, belong to a model, and say what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hardkv_sglang.cli.calibrate import CalibrationError, EventRecorder, place_events
from hardkv_sglang.config import HardKVConfig
from hardkv_sglang.selection.priors import SCORE_OPTIONS, Priors, PriorsError, check_options, load_priors

TEMPERATURE = [[0.5, 1.0, 0.0], [2.0, 0.25, 4.0]]


def priors(**changes: Any) -> Priors:
    given = HardKVConfig(metric="snapkv").to_dict()
    values: dict[str, Any] = {
        "model_name": "little",
        "num_layers": 2,
        "num_kv_heads": 3,
        "metric": "snapkv",
        "options": {name: given[name] for name in SCORE_OPTIONS},
        "temperature": TEMPERATURE,
        "num_events": 4,
    }
    return Priors(**{**values, **changes})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "priors.json"


def test_round_trip(path: Path) -> None:
    priors().save(path)
    assert Priors.read(path) == priors()
    loaded = load_priors(path, model_name="/models/Little", num_layers=2, num_kv_heads_global=3)
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded, torch.tensor(TEMPERATURE))


@pytest.mark.parametrize(
    ("model_name", "layers", "heads", "message"),
    [
        ("big", 2, 3, "model_name='little'.*'big'"),
        ("little", 3, 3, "num_layers=2"),
        ("little", 2, 4, "num_kv_heads=3"),
    ],
)
def test_another_model_is_refused(path: Path, model_name: str, layers: int, heads: int, message: str) -> None:
    priors().save(path)
    with pytest.raises(PriorsError, match=message):
        load_priors(path, model_name=model_name, num_layers=layers, num_kv_heads_global=heads)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "version 2"),
        ({"format": "other"}, "not a file of `hardkv calibrate`"),
        ({"temperature": [[1.0, 1.0, 1.0]]}, r"not \[2\]\[3\]"),
        ({"temperature": [[1.0, 1.0, -1.0], [1.0, 1.0, 1.0]]}, "not negative"),
        ({"temperature": 3}, "list of lists"),
    ],
)
def test_a_broken_file_is_refused(path: Path, changes: dict[str, Any], message: str) -> None:
    priors(**changes).save(path)
    with pytest.raises(PriorsError, match=message):
        Priors.read(path)


@pytest.mark.parametrize(("text", "message"), [("{", "not valid JSON"), ("[]", "not a file"), (None, "cannot be read")])
def test_an_unreadable_file_is_refused(path: Path, text: str | None, message: str) -> None:
    if text is not None:
        path.write_text(text)
    with pytest.raises(PriorsError, match=message):
        Priors.read(path)


def test_missing_fields_are_named(path: Path) -> None:
    priors().save(path)
    given = json.loads(path.read_text())
    del given["num_events"]
    path.write_text(json.dumps(given))
    with pytest.raises(PriorsError, match="num_events"):
        Priors.read(path)


def test_other_options_are_reported(path: Path) -> None:
    priors().save(path)
    assert check_options(path, HardKVConfig(metric="snapkv").to_dict()) == []
    (line,) = check_options(path, HardKVConfig(metric="snapkv", pooling_width=5).to_dict())
    assert "pooling_width=7" in line and "5" in line


def recorded(num_layers: int, num_heads: int) -> EventRecorder:
    """A recorder that saw random queries and keys of every layer."""
    options = HardKVConfig(metric="snapkv", budget="per_head", top_p=0.8, recent_tokens=128, select_interval=128)
    events = place_events(480, prompt_len=64, num_events=3, options=options)
    recorder = EventRecorder(options, 64, events)
    generator = torch.Generator().manual_seed(0)
    for _ in range(num_layers):
        query = torch.randn(2 * num_heads, 480, 16, generator=generator)
        key = 2.0 * torch.randn(num_heads, 480, 16, generator=generator)
        recorder.record(query, key, scale=16**-0.5)
    return recorder


def test_calibration_covers_every_layer_and_head(path: Path) -> None:
    recorder = recorded(num_layers=2, num_heads=3)
    assert recorder.events == [320, 400, 480]
    recorder.priors(path.parent / "Little").save(path)
    loaded = load_priors(path, model_name="Little", num_layers=2, num_kv_heads_global=3)
    assert loaded.shape == (2, 3)
    assert ((loaded >= 1 / 64) & (loaded <= 64)).all()
    # random keys differ from head to head, and so do the temperatures
    assert loaded.unique().numel() == loaded.numel()
    assert check_options(path, recorder.options.to_dict()) == []


def test_a_short_text_is_refused() -> None:
    with pytest.raises(CalibrationError, match="at least 320"):
        place_events(319, prompt_len=64, num_events=3, options=HardKVConfig(recent_tokens=128, select_interval=128))
