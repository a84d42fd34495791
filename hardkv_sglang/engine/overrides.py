"""Per-request override: `custom_params={"kv_compression": "none"}` keeps one request dense."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

KEY = "kv_compression"
CHOICES = ("none", "hardkv")


def override_error(custom_params: Mapping[str, Any]) -> str | None:
    """What is wrong with a request's override; None when nothing is."""
    value = custom_params.get(KEY, CHOICES[1])
    if value in CHOICES:
        return None
    return f"custom_params[{KEY!r}] must be one of {', '.join(map(repr, CHOICES))}; got {value!r}"


def is_opted_out(custom_params: Mapping[str, Any]) -> bool:
    """Whether the request asked to stay dense."""
    return custom_params.get(KEY) == "none"
