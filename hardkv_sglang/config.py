"""What a user may set; `memory_pool/resolved_config.py` has what it becomes with model and pool known."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, field, fields, replace
from os import PathLike, fspath
from pathlib import Path
from reprlib import Repr
from typing import Any

from hardkv_sglang.generated import write_or_print

SUPPORTED_PAGE_SIZES = (16, 32, 64)
MOST_CHARACTERS = 120  # of a value in a message


def option(
    default: Any,
    unit: str,
    doc: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] | tuple[int, ...] = (),
    optional: bool = False,
) -> Any:
    """Declare one user option: default, unit, one-line meaning and allowed values (both bounds included)."""
    meta = {"unit": unit, "doc": doc, "low": low, "high": high, "choices": choices, "optional": optional}
    return field(default=default, metadata=meta)


@dataclass(frozen=True)
class HardKVConfig:
    """Options of `--kv-compression-config`, validated on construction.

    Raises `ValueError` naming the option and its allowed values.
    """

    policy: str = option(
        "hardkv", "name", "rule that chooses the kept tokens",
        choices=("hardkv", "snapkv", "rkv", "streaming"),
    )  # fmt: skip
    metric: str = option(
        "output", "name", "importance metric of the hardkv policy", choices=("attention", "output", "snapkv", "rkv")
    )
    top_p: float = option(
        0.98, "probability",
        "share that is kept: of attention mass, prefix and recent window included; with the output metric, of the "
        "squared change that dropping makes",
        low=0.01, high=1.0,
    )  # fmt: skip
    kept_share: float | None = option(
        None, "fraction",
        "budget=shared: kept tokens over those that left the recent window, mean over KV heads; null: top_p decides",
        low=0.001, high=1.0, optional=True,
    )  # fmt: skip
    prior_weight: float = option(
        0.1, "fraction",
        "output metric: part of a KV head's energy that is expected on tokens whatever attention they got so far",
        low=0.0, high=1.0,
    )  # fmt: skip
    remembered_weight: float = option(
        0.7, "fraction",
        "output metric: weight of what earlier select events measured, tokens of the recent window included; takes two "
        "bytes per token and KV head",
        low=0.0, high=0.99,
    )  # fmt: skip
    calibration: str = option(
        "bisection", "name", "how a metric is mapped to probabilities before Top-p",
        choices=("bisection", "none"),
    )  # fmt: skip
    recalibrate_every: int = option(
        4, "select events", "events for which a calibrated temperature is reused", low=1, high=1024
    )
    group_reduction: str = option(
        "mean", "name", "reduction over the query heads of one KV head", choices=("mean", "max")
    )
    query_reduction: str = option(
        "mean", "name", "reduction over the observation queries", choices=("mean", "max", "union")
    )
    min_tokens: int = option(32, "tokens per KV head", "floor of the kept tokens", low=0, high=65536)
    max_tokens: int | None = option(
        4096, "tokens per KV head", "cap of the kept tokens; null lifts it",
        low=32, high=1 << 20, optional=True,
    )  # fmt: skip
    survivor_bits: int = option(
        16, "bits",
        "of a condensed element: 16 copies the pool's rows as they are; 8 and 4 quantise them when they are first "
        "condensed (CPU only)",
        choices=(16, 8, 4),
    )  # fmt: skip
    recent_tokens: int = option(256, "tokens", "newest tokens that are always attended", low=32, high=65536)
    query_window: int = option(64, "decode steps", "observation queries of a select event", low=1, high=256)
    select_interval: int = option(256, "tokens", "decode tokens between two select events", low=8, high=65536)
    condense_interval: int = option(
        256, "tokens", "sparse tokens of a request that trigger a condense event", low=32, high=65536
    )
    max_events_per_step: int = option(
        4, "requests", "requests that may have an event in one decode step", low=1, high=4096
    )
    min_freed_pages: int = option(
        1, "token pages", "what a condense event must give back to run; 0 runs it in any case", low=0, high=1024
    )
    min_shared_tokens: int | None = option(
        49152,
        "tokens",
        "reads of a token that a decode step must save for prefixes shared by requests to be attended once for all of "
        "them (GPU); null: never",
        low=1,
        high=1 << 30,
        optional=True,
    )
    pooling_width: int = option(7, "tokens", "max-pooling width of the snapkv metric (odd)", low=1, high=63)
    budget: str = option(
        "shared", "name",
        "hardkv policy: Top-p of each KV head, one Top-p over all heads of a request, or uniform_tokens for each",
        choices=("per_head", "shared", "uniform"),
    )  # fmt: skip
    guarantee: str = option(
        "none", "name", "raw: also keep the Top-p set of the mean attention, whatever metric and reductions",
        choices=("none", "raw"),
    )  # fmt: skip
    temperature_limit: float = option(
        64.0, "ratio", "calibrated temperatures stay in [1 / limit, limit]", low=1.0, high=65536.0
    )
    rkv_lambda: float = option(
        0.07, "fraction", "rkv metric: weight of attention, the rest weighs redundancy", low=0.0, high=1.0
    )
    rkv_similarity: float = option(
        0.5, "cosine", "rkv metric: keys more similar than this repeat each other", low=0.0, high=1.0
    )
    uniform_tokens: int = option(
        1024, "tokens per KV head", "budget of the snapkv and rkv policies and of budget=uniform",
        low=1, high=1 << 20,
    )  # fmt: skip
    sink_tokens: int = option(4, "tokens", "streaming policy: oldest candidates that are kept", low=0, high=65536)
    request_reports: int = option(
        0, "requests",
        "last compressed requests that /server_info lists with their ids and lengths, for tests and debugging: whoever "
        "may ask for it sees the requests of all clients",
        low=0, high=4096,
    )  # fmt: skip
    priors: str | None = option(
        None,
        "path",
        "temperatures of the first select event of a request, written by `hardkv calibrate`",
        optional=True,
    )

    def __post_init__(self) -> None:
        for f in fields(self):
            _check_option(f, getattr(self, f.name))
        if self.recent_tokens < self.query_window:
            raise ValueError(
                f"recent_tokens={self.recent_tokens} must be at least query_window={self.query_window}: "
                "observation queries may only score tokens older than themselves"
            )
        if self.select_interval < self.query_window:
            raise ValueError(
                f"select_interval={self.select_interval} must be at least query_window={self.query_window}: "
                "the attended set must not change inside one observation window"
            )
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} exceeds max_tokens={self.max_tokens}")
        fixed = self._fixed_budget
        if fixed is not None and self.max_tokens is not None and getattr(self, fixed) > self.max_tokens:
            raise ValueError(f"{fixed}={getattr(self, fixed)} exceeds max_tokens={self.max_tokens}")
        if self.budget == "shared" and self.query_reduction == "union":
            raise ValueError("query_reduction=union chooses a set per query and head: use it with budget=per_head")
        if self.kept_share is not None and (self.policy != "hardkv" or self.budget != "shared"):
            raise ValueError(
                "kept_share is a budget over all heads of a request: use it with policy=hardkv, budget=shared"
            )
        if self.pooling_width % 2 == 0:
            raise ValueError(f"pooling_width={self.pooling_width} must be odd")

    @property
    def _fixed_budget(self) -> str | None:
        """The option that is the budget, where the policy does not compute one."""
        if self.policy == "streaming":
            return "sink_tokens"
        return None if self.policy == "hardkv" and self.budget != "uniform" else "uniform_tokens"

    @classmethod
    def from_mapping(cls, given: Mapping[str, Any]) -> HardKVConfig:
        """Build from parsed JSON or YAML. Raises `ValueError` for an unknown key, listing the known ones."""
        known = [f.name for f in fields(cls)]
        unknown = [key for key in given if key not in known]
        if unknown:
            raise ValueError(f"unknown option {', '.join(map(brief, unknown))}; known: {', '.join(known)}")
        return cls(**given)

    @classmethod
    def parse(cls, source: str | PathLike[str] | Mapping[str, Any] | None) -> HardKVConfig:
        """Read options from a mapping, a JSON object, or the path of a JSON file.

        Raises `ValueError` when the source is none of these, or an option is refused.
        """
        if source is None:
            return cls()
        if isinstance(source, Mapping):
            return cls.from_mapping(source)
        if not isinstance(source, str | PathLike):
            raise ValueError(
                f"kv_compression_config={brief(source)} must be a mapping, a JSON object or the path of a JSON file, "
                f"not {type(source).__name__}"
            )
        text = source.strip() if isinstance(source, str) else fspath(source)
        if not text.startswith("{"):
            text = _read_text(text)
        try:
            given = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"kv_compression_config is not valid JSON: {error}") from error
        if not isinstance(given, dict):
            raise ValueError(f"kv_compression_config must be a JSON object, got {type(given).__name__}")
        return cls.from_mapping(given)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-serialisable options, as `parse` reads them back."""
        return asdict(self)

    def with_options(self, **changes: Any) -> HardKVConfig:
        """A validated copy with some options changed."""
        return replace(self, **changes)


def brief(value: object) -> str:
    """A value for a message, in at most `MOST_CHARACTERS` characters and at any depth."""
    shortener = Repr()
    shortener.maxlevel, shortener.maxstring = 2, MOST_CHARACTERS
    text = shortener.repr(value)
    return text if len(text) <= MOST_CHARACTERS else f"{text[: MOST_CHARACTERS - 3]}..."


def _read_text(path: str) -> str:
    try:
        return Path(path).expanduser().read_text()
    except (OSError, ValueError, RuntimeError) as error:
        # no such file, no permission, not UTF-8, a name that no file system takes, no such home directory
        raise ValueError(f"kv_compression_config={brief(path)} is neither a JSON object nor a readable file") from error


def describe_range(f: Field[Any]) -> str:
    """Allowed values of an option, for messages and docs/options.md."""
    meta = f.metadata
    if meta["choices"]:
        return " | ".join(map(str, meta["choices"]))
    if meta["low"] is None:
        return "JSON file or null"
    text = f"{meta['low']:g} .. {meta['high']:g}"
    return f"{text} or null" if meta["optional"] else text


def _check_option(f: Field[Any], value: Any) -> None:
    meta = f.metadata
    if value is None and meta["optional"]:
        return
    if meta["choices"]:
        if value not in meta["choices"] or type(value) is not type(f.default):
            raise ValueError(f"{f.name}={brief(value)} is not one of: {describe_range(f)}")
        return
    if meta["low"] is None:
        if not isinstance(value, str):
            raise ValueError(f"{f.name}={brief(value)} must be a {meta['unit']}: {describe_range(f)}")
        return
    numeric = (int, float) if isinstance(meta["low"], float) else (int,)
    if isinstance(value, bool) or not isinstance(value, numeric):
        kind = numeric[-1].__name__
        raise ValueError(f"{f.name}={brief(value)} must be a {kind} in {describe_range(f)} ({meta['unit']})")
    if not meta["low"] <= value <= meta["high"]:
        raise ValueError(f"{f.name}={brief(value)} is out of range: {describe_range(f)} ({meta['unit']})")


def options_table() -> str:
    """The options as a Markdown table, for docs/options.md."""
    lines = ["| option | default | range | unit | meaning |", "|---|---|---|---|---|"]
    for f in fields(HardKVConfig):
        allowed = describe_range(f).replace(" | ", ", ")
        lines.append(
            f"| `{f.name}` | {json.dumps(f.default)} | {allowed} | {f.metadata['unit']} | {f.metadata['doc']} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    write_or_print("options", options_table())
