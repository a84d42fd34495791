"""What the frontier compares, most important first: the rule, its parts, rivals at the same windows and intervals."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from hardkv_sglang.config import HardKVConfig

RULE: dict[str, Any] = {"prior_weight": 0.1, "remembered_weight": 0.7}
OBSERVED_ONLY: dict[str, Any] = {"prior_weight": 0.0, "remembered_weight": 0.0}


@dataclass(frozen=True)
class Point:
    """One set of options, or a number format for all KV."""

    family: str
    name: str
    options: dict[str, Any] = field(default_factory=dict)
    quantisation: str | None = None
    by_query_centres: bool = False  # candidates are rated by `tri.TriScorer`

    @property
    def config(self) -> HardKVConfig:
        """The options as the server would read them."""
        return HardKVConfig(**self.options)


def schedule(recent: int, interval: int = 128) -> dict[str, Any]:
    """A recent window with both intervals alike, and no cap."""
    return {"recent_tokens": recent, "select_interval": interval, "condense_interval": interval, "max_tokens": None}


def kept(recent: int, share: float, interval: int = 128, name: str = "", **changes: Any) -> Point:
    """The rule with a fixed share of the aged tokens."""
    options = {**schedule(recent, interval), **RULE, "kept_share": share, **changes}
    label = f"hardkv {recent}/{interval} share {share:g}"
    return Point("hardkv, remembered and prior" if not name else f"hardkv, {name}", f"{label} {name}".strip(), options)


def top_p(recent: int, p: float, interval: int = 128) -> Point:
    """The rule with Top-p."""
    options = {"top_p": p, **schedule(recent, interval), **RULE}
    return Point("hardkv, remembered and prior, top_p", f"hardkv {recent}/{interval} top_p {p:g}", options)


def streaming(recent: int) -> Point:
    """Sinks and a window."""
    return Point("streaming", f"streaming {recent}/128", {"policy": "streaming", **schedule(recent)})


def uniform(policy: str, tokens: int, recent: int) -> Point:
    """The same number of tokens for every head."""
    options = {"policy": policy, "uniform_tokens": tokens, **schedule(recent)}
    return Point(policy, f"{policy} {tokens} {recent}/128", options)


def tri(tokens: int, recent: int) -> Point:
    """TriAttention: `uniform` by calibrated query centres."""
    point = uniform("snapkv", tokens, recent)
    return replace(point, family="tri", name=f"tri {tokens} {recent}/128", by_query_centres=True)


def defaults() -> Point:
    """What a server does by itself, without a cap."""
    return Point("defaults", "hardkv defaults", {"max_tokens": None})


def observed_only() -> Point:
    """What was observed last, and nothing else, at long intervals: the defaults of earlier versions."""
    options = {"top_p": 0.995, **schedule(128, 512), **OBSERVED_ONLY}
    return Point("observed only", "hardkv 128/512 top_p 0.995, observed only", options)


def first() -> list[Point]:
    """What a short run has: the rule and the defaults, each rival at about the same bytes, from an eighth on."""
    return [
        kept(256, 0.1),
        kept(256, 0.2),
        streaming(512),
        uniform("rkv", 256, 256),
        uniform("snapkv", 256, 256),
        defaults(),
        observed_only(),
        top_p(256, 0.98),
        kept(256, 0.1, 256, name="interval 256"),
        streaming(256),
        kept(128, 0.05),
        uniform("rkv", 64, 128),
        tri(256, 256),
        kept(256, 0.1, name="neither", **OBSERVED_ONLY),
        kept(512, 0.05),
        streaming(1024),
        uniform("rkv", 256, 512),
        top_p(256, 0.95),
        uniform("snapkv", 64, 128),
        *(top_p(*point, 256) for point in ((256, 0.99), (128, 0.98), (128, 0.99))),
    ]


def rule() -> list[Point]:
    """The rule, by window and share."""
    pairs = ((512, 0.1), (128, 0.15), (256, 0.05), (128, 0.3), (512, 0.2), (256, 0.3))
    return [kept(recent, share) for recent, share in pairs]


def rivals() -> list[Point]:
    """Windows, and uniform budgets at the same windows and intervals."""
    return [
        streaming(768),
        *(uniform(*point) for point in (("snapkv", 256, 512), ("rkv", 512, 256), ("rkv", 128, 512))),
        *(tri(*point) for point in ((64, 128), (256, 512), (512, 256))),
        Point("hardkv, top_p alone", "hardkv 512/128 top_p 0.98", {"top_p": 0.98, **schedule(512), **OBSERVED_ONLY}),
    ]


def parts() -> list[Point]:
    """What each part is worth, at one window and share."""
    base = (256, 0.1)
    return [
        kept(*base, name="prior alone", remembered_weight=0.0),
        kept(*base, name="remembered alone", prior_weight=0.0),
        *(kept(*base, name=f"prior {weight:g}", prior_weight=weight) for weight in (0.3, 0.03)),
        *(kept(*base, name=f"remembered {weight:g}", remembered_weight=weight) for weight in (0.9, 0.5)),
        *(kept(*base, name=f"{window} queries", query_window=window) for window in (32, 128)),
        kept(256, 0.1, 64, name="interval 64", query_window=32),
        *(top_p(256, p) for p in (0.99, 0.995)),
    ]


def formats() -> list[Point]:
    """Fewer bits, and nothing dropped at all."""
    exact = {"top_p": 1.0, "min_freed_pages": 0, **schedule(256), **RULE}
    names = ("fp8_e4m3", "fp8_e5m2", "int8", "int4")
    return [*(Point("fewer bits", name, quantisation=name) for name in names), Point("exact", "hardkv top_p 1", exact)]


def frontier_points() -> list[Point]:
    """All points."""
    return [*first(), *parts()[:2], *rule(), *rivals(), *formats(), *parts()[2:]]
