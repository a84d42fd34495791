"""Temperature priors: what `hardkv calibrate` learned about every KV head of a model, as JSON.

With priors the first select event of a request already has good temperatures. They belong to one model and one
metric, and are shaped by the options that define its scores.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

FORMAT = "hardkv-priors"
FORMAT_VERSION = 1
SCORE_OPTIONS = ("top_p", "group_reduction", "query_reduction", "pooling_width", "rkv_lambda", "rkv_similarity")
"""Options that temperatures depend on, besides the metric."""


class PriorsError(ValueError):
    """A priors file cannot be used; the message names the file and says why."""


@dataclass(frozen=True)
class Priors:
    """Contents of a priors file."""

    model_name: str  # last part of the model's path or hub name
    num_layers: int
    num_kv_heads: int  # of the whole model, not of one tensor-parallel rank
    metric: str
    options: dict[str, Any]  # SCORE_OPTIONS
    temperature: list[list[float]]  # [L][H], 0 where no temperature was found
    num_events: int  # select events that the temperatures are the mean of
    format: str = FORMAT
    version: int = FORMAT_VERSION

    def save(self, path: Path) -> None:
        """Write the file."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: str | Path) -> Priors:
        """Read a file and check that it is complete and consistent. Raises `PriorsError`."""
        try:
            given = json.loads(Path(path).expanduser().read_text())
        except OSError as error:
            raise PriorsError(f"{path}: cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise PriorsError(f"{path}: not valid JSON: {error}") from error
        if not isinstance(given, dict) or given.get("format") != FORMAT:
            raise PriorsError(f"{path}: not a file of `hardkv calibrate`")
        if given.get("version") != FORMAT_VERSION:
            raise PriorsError(f"{path}: format version {given.get('version')}, this release reads {FORMAT_VERSION}")
        if set(given) != set(cls.__dataclass_fields__):
            raise PriorsError(f"{path}: fields {sorted(set(given) ^ set(cls.__dataclass_fields__))} missing or unknown")
        priors = cls(**given)
        priors._check_temperature(path)
        return priors

    def _check_temperature(self, path: str | Path) -> None:
        rows = self.temperature
        if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
            raise PriorsError(f"{path}: temperature must be a list of lists")
        if len(rows) != self.num_layers or any(len(row) != self.num_kv_heads for row in rows):
            raise PriorsError(f"{path}: temperature is not [{self.num_layers}][{self.num_kv_heads}]")
        if not all(isinstance(t, (int, float)) and math.isfinite(t) and t >= 0 for row in rows for t in row):
            raise PriorsError(f"{path}: temperatures must be finite and not negative")


def model_base_name(name: str) -> str:
    """Last part of a model's folder or hub name: what survives moving the model."""
    return Path(name).name.lower()


def load_priors(path: str | Path, *, model_name: str, num_layers: int, num_kv_heads_global: int) -> torch.Tensor:
    """Temperatures [L, H] float32 of a priors file, 0 where there is none.

    model_name: folder or hub name of the served model. Raises `PriorsError` when the file is broken or belongs to
    another model.
    """
    priors = Priors.read(path)
    expected = {
        "model_name": model_base_name(model_name),
        "num_layers": num_layers,
        "num_kv_heads": num_kv_heads_global,
    }
    for field, value in expected.items():
        found = getattr(priors, field)
        if found != value:
            raise PriorsError(f"{path}: made for {field}={found!r}, but the served model has {value!r}")
    return torch.tensor(priors.temperature, dtype=torch.float32)


def check_options(path: str | Path, options: Mapping[str, Any]) -> list[str]:
    """Differences between the options that the priors were made with and `options`, as readable lines.

    options: of the server, as `HardKVConfig.to_dict` gives them. An empty list means that the priors fit.
    """
    priors = Priors.read(path)
    wanted = {"metric": priors.metric, **priors.options}
    return [
        f"priors were made with {name}={value!r}, the server has {options.get(name)!r}"
        for name, value in wanted.items()
        if options.get(name) != value
    ]
