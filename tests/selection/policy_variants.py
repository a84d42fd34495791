"""Options of every policy, and how the tests of policies ask them."""

from __future__ import annotations

import torch

from hardkv_sglang.config import HardKVConfig
from hardkv_sglang.selection.policies import make_policy
from hardkv_sglang.selection.policies.base import Policy
from hardkv_sglang.selection.top_p import Candidates, Selection

PER_HEAD = {"metric": "attention", "budget": "per_head", "top_p": 0.95}
"""What the tests start from, whatever is shipped."""
FREE = {"min_tokens": 0, "max_tokens": None}
"""No floor and no cap."""
ATTENTION = {"metric": "attention", **FREE}
VARIANTS = [
    {},
    {"metric": "output"},
    {"metric": "output", "budget": "shared"},
    {"metric": "snapkv", "budget": "shared"},
    {"budget": "shared"},
    {"query_reduction": "union"},
    {"group_reduction": "max", "query_reduction": "max"},
    {"metric": "snapkv"},
    {"metric": "snapkv", "calibration": "none"},
    {"metric": "snapkv", "query_reduction": "union", "guarantee": "raw"},
    {"metric": "rkv"},
    {"metric": "rkv", "query_reduction": "union"},
    {"budget": "uniform", "uniform_tokens": 33},
    {"policy": "snapkv", "uniform_tokens": 32},
    {"policy": "rkv", "uniform_tokens": 31},
    {"policy": "streaming"},
]
"""Every policy, metric and reduction at least once."""


def ids(options: dict) -> str:
    return "-".join(f"{value}" for value in options.values()) or "default"


def policy_of(**options) -> Policy:
    return make_policy(HardKVConfig(**{**PER_HEAD, **options}), 1)


def select(candidates: Candidates, temperature: torch.Tensor | None = None, **options) -> Selection:
    return policy_of(**options).select(candidates, temperature)


def as_sets(mask: torch.Tensor) -> list[set[int]]:
    return [{j for j, kept in enumerate(row) if kept} for row in mask.tolist()]


def equal(a: Selection, b: Selection) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("keep", "temperature", "infeasible"))
