"""Per-request override: `custom_params={"kv_compression": "none"}` keeps one request dense.

The values are what a client sent: of any type, size and depth, and most of them are meant for others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import SequenceMatcher
from itertools import islice

from hardkv_sglang.config import brief

KEY = "kv_compression"
CHOICES = ("none", "hardkv")
MOST_KEYS = 64
"""Keys that are compared with ours; a client may send a million."""
ALIKE = 0.92
"""Similarity from which a key is taken for a misspelling: one letter wrong, missing or too many, or two swapped."""


def override_error(custom_params: object) -> str | None:
    """What is wrong with a request's override, None when nothing is. Short: it is sent back and logged."""
    if not isinstance(custom_params, Mapping):
        return None
    if KEY not in custom_params:
        key = _misspelt_key(custom_params)
        return None if key is None else f"custom_params has no {key!r}: do you mean {KEY!r}?"
    value = custom_params[KEY]
    if isinstance(value, str) and value in CHOICES:
        return None
    return f"custom_params[{KEY!r}] must be one of {', '.join(map(repr, CHOICES))}; got {brief(value)}"


def is_opted_out(custom_params: object) -> bool:
    """Whether the request asked to stay dense."""
    return isinstance(custom_params, Mapping) and custom_params.get(KEY) == CHOICES[0]


def _misspelt_key(custom_params: Mapping[object, object]) -> str | None:
    """The first key that its client most likely meant to be ours."""
    for key in islice(custom_params, MOST_KEYS):
        if isinstance(key, str) and len(key) <= 2 * len(KEY) and _is_alike(key):
            return key
    return None


def _is_alike(key: str) -> bool:
    # "KV-Compression" and "kvCompression" differ from our key in no letter
    letters = re.sub(r"[^a-z0-9]", "", key.lower())
    return SequenceMatcher(None, letters, KEY.replace("_", "")).ratio() >= ALIKE
