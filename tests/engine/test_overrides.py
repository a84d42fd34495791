"""The per-request override, which any client may send in any shape."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hardkv_sglang.engine.overrides import CHOICES, KEY, is_opted_out, override_error

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
json_values = st.recursive(
    scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner), max_leaves=20
)
MOST_MESSAGE = 300


@given(json_values)
def test_any_value_is_answered(value: Any) -> None:
    message = override_error(value)
    assert message is None or KEY in message
    assert is_opted_out(value) in (True, False)


@given(json_values)
def test_any_value_of_our_key_is_accepted_or_named(value: Any) -> None:
    message = override_error({KEY: value})
    if value in ("none", "hardkv"):
        assert message is None
        return
    assert message is not None
    assert f"custom_params[{KEY!r}]" in message
    assert len(message) < MOST_MESSAGE
    assert not is_opted_out({KEY: value})


@pytest.mark.parametrize("value", ["x" * 5_000_000, [["x" * 1000] * 1000] * 1000, {str(i): i for i in range(100_000)}])
def test_a_huge_value_makes_a_short_message(value: Any) -> None:
    message = override_error({KEY: value})
    assert message is not None
    assert len(message) < MOST_MESSAGE


@pytest.mark.parametrize(
    "key",
    ["kv_compresion", "kv_compressoin", "kv_compressions", "kvcompression", "kv-compression", "KV_COMPRESSION",
     "kvCompression", "v_compression"],
)  # fmt: skip
def test_a_misspelt_key_is_named(key: str) -> None:
    message = override_error({"thinking_budget": 7, key: "none"})
    assert message is not None
    assert repr(key) in message
    assert repr(KEY) in message


@pytest.mark.parametrize(
    "key", ["compression", "kv_cache", "kv_expression", "kv_cache_compression", "thinking_budget", "", 7, "x" * 10_000]
)
def test_keys_of_others_stay(key: Any) -> None:
    assert override_error({key: "none"}) is None


def test_our_key_beside_a_misspelt_one_counts() -> None:
    params = {"kv_compresion": "hardkv", KEY: CHOICES[0]}
    assert override_error(params) is None
    assert is_opted_out(params)
