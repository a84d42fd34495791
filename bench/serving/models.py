"""Where the model of a run comes from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.serving.dummy_models import SHAPES, write_model, write_tokenizer
from bench.serving.presets import DEMO_MODEL
from hardkv_sglang.cli.demo_model import demo_model_path


def prepare_model(name: str, folder: Path) -> tuple[Path, dict[str, Any]]:
    """Folder with the model and its tokenizer, and the flags that load it.

    name: `demo`, a shape of dummy_models.py, or a folder. Needs no network.
    Raises `ValueError` for another name, `DemoModelError` if there is no demo model.
    """
    if name == DEMO_MODEL:
        return demo_model_path(), {}
    if name in SHAPES:
        model = write_model(SHAPES[name], folder / name)
        write_tokenizer(SHAPES[name].vocab_size, model)
        return model, {"load-format": "dummy"}
    if not (Path(name) / "config.json").is_file():
        raise ValueError(f"--model {name}: neither a model folder nor one of: {DEMO_MODEL}, {', '.join(SHAPES)}")
    return Path(name).resolve(), {}


def layer_flags(layers: int | None) -> dict[str, Any]:
    """Flags that run only the first layers of a model."""
    return {} if layers is None else {"json-model-override-args": json.dumps({"num_hidden_layers": layers})}
