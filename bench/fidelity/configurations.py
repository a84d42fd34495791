"""What is compared: rivals, sweeps and ablations, most important first."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from hardkv_sglang.config import HardKVConfig

ABLATION_DOCUMENTS = 3
SCHEDULE: dict[str, Any] = {
    "recent_tokens": 128, "select_interval": 512, "condense_interval": 512, "prior_weight": 0.0,
    "remembered_weight": 0.0,
}  # fmt: skip
"""What points of the sweep do not say: long intervals, and nothing but what was observed last. Not the defaults."""


@dataclass(frozen=True)
class Configuration:
    """One point of the sweep."""

    family: str  # the curve that it belongs to
    point: str  # the swept value
    options: dict[str, Any]
    num_documents: int | None = None  # run on the first so many documents; None: on all
    needle: bool = False  # also run on the needle documents

    @property
    def name(self) -> str:
        """Readable and unique."""
        return f"{self.family} {self.point}"

    @property
    def key(self) -> str:
        """File name part that changes with the options."""
        text = json.dumps(self.options, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def config(self) -> HardKVConfig:
        """The options as the server would read them."""
        return HardKVConfig(**{**SCHEDULE, **self.options})


def sweep(
    family: str, option: str, values: Sequence[float | int], *, documents: int | None = None, **fixed: Any
) -> list[Configuration]:
    """One configuration per value of an option."""
    return [Configuration(family, f"{option}={value:g}", {**fixed, option: value}, documents) for value in values]


def with_needles(configurations: list[Configuration], *names: str) -> list[Configuration]:
    """Mark the named configurations for the needle test."""
    return [replace(c, needle=c.name in names) for c in configurations]


def core() -> list[Configuration]:
    """HARD-KV by what was observed last, and the methods with the same number of tokens for every head."""
    return [
        *sweep("hardkv", "top_p", (0.995, 0.98, 0.999)),
        *sweep("snapkv", "uniform_tokens", (128, 256), policy="snapkv"),
        *sweep("rkv", "uniform_tokens", (128, 256), policy="rkv"),
        *sweep("streaming", "recent_tokens", (384,), policy="streaming"),
    ]


def extremes() -> list[Configuration]:
    """The ends of the curves of `core`."""
    return [
        *sweep("hardkv", "top_p", (0.95, 0.9999)),
        *sweep("snapkv", "uniform_tokens", (64, 512), policy="snapkv"),
        *sweep("rkv", "uniform_tokens", (64, 512), policy="rkv"),
    ]


def parts() -> list[Configuration]:
    """What each part of that rule is worth: one changed at a time, swept, so that bytes can be made equal."""
    few = ABLATION_DOCUMENTS
    return [
        *sweep("attention, per head", "top_p", (0.95, 0.98), documents=few, metric="attention", budget="per_head"),
        *sweep("attention, shared", "top_p", (0.95, 0.98), documents=few, metric="attention"),
        *sweep("attention, uniform", "uniform_tokens", (128, 256), documents=few, metric="attention", budget="uniform"),
        *sweep("output, uniform", "uniform_tokens", (128, 256), documents=few, budget="uniform"),
        *sweep("output, per head", "top_p", (0.98,), documents=few, budget="per_head"),
        *sweep("snapkv metric, per head", "top_p", (0.95,), documents=few, metric="snapkv", budget="per_head"),
    ]


def ablations() -> list[Configuration]:
    """One option changed at a time."""
    changes: list[tuple[str, dict[str, Any]]] = [
        ("32 queries", {"query_window": 32}),
        ("128 queries", {"query_window": 128}),
        ("cautious sparse span", {"select_interval": 128}),
        ("immediate condensation", {"select_interval": 128, "condense_interval": 128}),
        ("floor 0", {"min_tokens": 0}),
        ("floor 64", {"min_tokens": 64}),
        ("window 64", {"recent_tokens": 64}),
        ("window 256", {"recent_tokens": 256}),
        ("maximum over queries", {"query_reduction": "max"}),
        (
            "attention, per head, union over queries",
            {"metric": "attention", "budget": "per_head", "query_reduction": "union", "top_p": 0.95},
        ),
        (
            "snapkv metric, per head, uncalibrated",
            {"metric": "snapkv", "budget": "per_head", "calibration": "none", "top_p": 0.95},
        ),
    ]
    return [ablation(name, options) for name, options in changes]


def ablation(name: str, options: dict[str, Any]) -> Configuration:
    """A configuration on fewer documents, named after what differs from the shipped options."""
    swept = {"top_p", "budget", "uniform_tokens"}
    point = ", ".join(f"{key}={value}" for key, value in options.items() if key not in swept)
    return Configuration(f"ablation {name}", point, options, ABLATION_DOCUMENTS)


def full_sweep() -> list[Configuration]:
    """Everything that the documentation reports, most important first."""
    asked = ("hardkv top_p=0.995", "hardkv top_p=0.999", "snapkv uniform_tokens=256", "rkv uniform_tokens=256")
    return with_needles([*core(), *parts(), *ablations(), *exact(), *extremes()], *asked)


def quick_sweep() -> list[Configuration]:
    """Three configurations for continuous integration."""
    shipped = Configuration("hardkv", "shipped", {})
    return [shipped, *sweep("snapkv", "uniform_tokens", (128,), policy="snapkv"), *exact()]


def exact() -> list[Configuration]:
    """p = 1 without a cap: must equal dense attention."""
    return [Configuration("exact", "top_p=1", {"top_p": 1.0, "max_tokens": None, "min_freed_pages": 0}, 1)]
