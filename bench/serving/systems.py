"""The servers that are compared, as flags of `sglang.launch_server`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hardkv_sglang.cli.server_process import Flags

STOCK = "stock"
STOCK_SAME_FLAGS = "stock-same-flags"
HARDKV = "hardkv"
NAMES = (STOCK, STOCK_SAME_FLAGS, HARDKV)
"""Order of a round and of the tables; the first that is measured is what the others are compared with."""


@dataclass(frozen=True)
class System:
    """One server configuration."""

    name: str
    meaning: str
    flags: Flags


def build_systems(common: Flags, same_flags: Flags, options: dict[str, Any]) -> list[System]:
    """All systems, in the order of `NAMES`.

    common: what every server gets, above all the same pool; same_flags: what HARD-KV starts with instead of stock
    defaults; options: of compression.
    """
    compression = {"kv-compression": "hardkv", "kv-compression-config": json.dumps(options)}
    return [
        System(STOCK, "SGLang with its own defaults", dict(common)),
        System(STOCK_SAME_FLAGS, "SGLang with the flags that HARD-KV starts with", {**common, **same_flags}),
        System(HARDKV, "compression", {**common, **same_flags, **compression}),
    ]


def select(systems: Sequence[System], names: Sequence[str]) -> list[System]:
    """The systems with these names. Raises `ValueError` naming the known ones."""
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise ValueError(f"no system {', '.join(unknown)}; there are: {', '.join(NAMES)}")
    return [system for system in systems if system.name in names]
