"""What is compared: rivals, sweeps and ablations, most important first."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from hardkv_sglang.config import HardKVConfig

ABLATION_DOCUMENTS = 2


@dataclass(frozen=True)
class Configuration:
    """One point of the sweep."""

    family: str  # the curve that it belongs to
    point: str  # the swept value
    options: dict[str, Any]
    num_documents: int | None = None  # run on the first so many documents; None: on all
    needle: bool = False  # also run on the needle documents
    threshold: float | None = None  # importance threshold of `ThresholdPolicy`, which then replaces the policy
    fills_pages: bool = False  # use `PageFillingPolicy`

    @property
    def name(self) -> str:
        """Readable and unique."""
        return f"{self.family} {self.point}"

    @property
    def key(self) -> str:
        """File name part that changes with the options."""
        text = json.dumps([self.options, self.threshold] + ["filled"] * self.fills_pages, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def config(self) -> HardKVConfig:
        """The options as the server would read them."""
        return HardKVConfig(**self.options)


def sweep(
    family: str, option: str, values: Sequence[float | int], *, documents: int | None = None, **fixed: Any
) -> list[Configuration]:
    """One configuration per value of an option."""
    return [Configuration(family, f"{option}={value:g}", {**fixed, option: value}, documents) for value in values]


def with_needles(configurations: list[Configuration], *names: str) -> list[Configuration]:
    """Mark the named configurations for the needle test."""
    return [replace(c, needle=c.name in names) for c in configurations]


def rivals() -> list[Configuration]:
    """Methods with the same number of tokens for every head."""
    return [
        *sweep("streaming", "recent_tokens", (256, 192, 384), policy="streaming"),
        *sweep("rkv", "uniform_tokens", (128, 64, 192), policy="rkv"),
    ]


def core() -> list[Configuration]:
    """HARD-KV as shipped, the strongest rival, and HARD-KV's metric with one budget for all heads."""
    return [
        *sweep("snapkv", "uniform_tokens", (128, 64, 256), policy="snapkv"),
        *sweep("hardkv attention", "top_p", (0.95, 0.98, 0.9)),
        *sweep("attention uniform", "uniform_tokens", (128, 64, 192), budget="uniform"),
        *sweep("hardkv attention, floor 96", "top_p", (0.95,), min_tokens=96),
    ]


def metrics() -> list[Configuration]:
    """HARD-KV on the other metrics."""
    return [
        *sweep("hardkv snapkv", "top_p", (0.95, 0.99), metric="snapkv"),
        *sweep("hardkv rkv", "top_p", (0.95,), documents=ABLATION_DOCUMENTS, metric="rkv"),
    ]


def ablations() -> list[Configuration]:
    """One part changed at a time, on fewer documents."""
    top_p, uniform = {"top_p": 0.98}, {"budget": "uniform", "uniform_tokens": 128}
    changes: list[tuple[str, dict[str, Any]]] = [
        ("top_p=0.98", top_p),
        ("uniform 128", uniform),
    ]
    events = [{"condense_interval": 128}, {"query_window": 128}, {"recent_tokens": 256}]
    parts: list[tuple[str, dict[str, Any]]] = [
        ("snapkv top_p=0.95", {"metric": "snapkv", "calibration": "none"}),
        ("snapkv top_p=0.99", {"top_p": 0.99, "metric": "snapkv", "calibration": "none"}),
        ("top_p=0.95", {"query_reduction": "union"}),
        ("top_p=0.95", {"query_reduction": "max"}),
        ("top_p=0.95", {"group_reduction": "max"}),
        ("uniform 128", {"query_reduction": "max", **uniform}),
        ("top_p=0.98", {"recent_tokens": 64, **top_p}),
    ]
    changed = [(name, {**base, **change}) for change in events for name, base in changes]
    return [ablation(name, options) for name, options in [*parts, *changed]] + [
        Configuration("threshold", f"{value:g}", {}, ABLATION_DOCUMENTS, threshold=value)
        for value in (1e-4, 3e-4, 1e-3)
    ]


def experiments() -> list[Configuration]:
    """Rules that are not shipped; `late` selects once, just before tokens are condensed: no cautious sparse span."""
    few = ABLATION_DOCUMENTS
    filled = sweep("hardkv, pages filled, late", "top_p", (0.9, 0.95, 0.98), documents=few, select_interval=512)
    return [
        *(replace(configuration, fills_pages=True) for configuration in filled),
        *sweep(
            "attention uniform, late", "uniform_tokens", (128, 64, 192),
            documents=few, budget="uniform", select_interval=512,
        ),
        *sweep(
            "snapkv, late", "uniform_tokens", (64, 128), documents=few, policy="snapkv", select_interval=512
        ),
        *sweep("hardkv attention, late", "top_p", (0.98,), documents=few, select_interval=512),
        replace(ablation("pages filled", {"top_p": 0.95}), fills_pages=True),
        ablation("top_p=0.98", {"top_p": 0.98, "min_tokens": 64, "max_tokens": 256}),
    ]  # fmt: skip


def ablation(name: str, options: dict[str, Any]) -> Configuration:
    """A configuration on fewer documents, named after what differs from the shipped options."""
    swept = {"top_p", "budget", "uniform_tokens"}
    point = ", ".join(f"{key}={value}" for key, value in options.items() if key not in swept)
    return Configuration(f"ablation {name}", point, options, ABLATION_DOCUMENTS)


def full_sweep() -> list[Configuration]:
    """Everything that the documentation reports, most important first."""
    asked = ("hardkv attention top_p=0.95", "hardkv attention top_p=0.98", "snapkv uniform_tokens=128",
             "attention uniform uniform_tokens=128", "streaming recent_tokens=256")  # fmt: skip
    measured = [*core(), *experiments(), *rivals(), *metrics(), *ablations(), *exact()]
    return with_needles(measured, *asked)


def quick_sweep() -> list[Configuration]:
    """Three configurations for continuous integration."""
    shipped = Configuration("hardkv attention", "shipped", {})
    return [shipped, *sweep("snapkv", "uniform_tokens", (128,), policy="snapkv"), *exact()]


def exact() -> list[Configuration]:
    """p = 1 without a cap: must equal dense attention."""
    return [Configuration("exact", "top_p=1", {"top_p": 1.0, "max_tokens": None, "min_freed_pages": 0}, 1)]
