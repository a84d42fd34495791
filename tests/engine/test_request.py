"""The fields of SGLang's requests that we name are fields of SGLang's classes, read from its sources."""

from __future__ import annotations

import ast
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from hardkv_sglang.engine import request
from hardkv_sglang.engine.request import KVInfo, KVRecord, PrefillByLength, PrefillBySlots, Request, Sampling


@cache
def syntax_of(module: str) -> ast.Module:
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None
    return ast.parse(Path(spec.origin).read_text())


def members(module: str, name: str) -> set[str]:
    """Methods, declared fields and attributes set on `self` of a class."""
    (definition,) = [n for n in ast.walk(syntax_of(module)) if isinstance(n, ast.ClassDef) and n.name == name]
    names = {n.name for n in definition.body if isinstance(n, ast.FunctionDef)}
    names |= {n.target.id for n in definition.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    stored = (n for n in ast.walk(definition) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store))
    return names | {n.attr for n in stored if isinstance(n.value, ast.Name) and n.value.id == "self"}


@pytest.mark.parametrize(
    ("protocol", "module", "name"),
    [
        (Request, "sglang.srt.managers.schedule_batch", "Req"),
        (KVInfo, "sglang.srt.managers.schedule_batch", "ReqKvInfo"),
        (Sampling, "sglang.srt.sampling.sampling_params", "SamplingParams"),
    ],
)
def test_sglang_has_what_we_name(protocol: type, module: str, name: str) -> None:
    ours = members(request.__name__, protocol.__name__)
    assert ours
    assert ours <= members(module, name)


def test_row_and_lengths_are_in_one_of_two_places() -> None:
    ours = members(request.__name__, KVRecord.__name__)
    places = [members("sglang.srt.managers.schedule_batch", name) for name in ("Req", "ReqKvInfo")]
    assert [ours <= place for place in places].count(True) == 1
    # what `compat.record_of` looks for is in the same place as the rest
    assert ["kv_committed_len" in place for place in places] == [ours <= place for place in places]


def test_a_prefill_is_told_in_one_of_two_ways() -> None:
    theirs = members("sglang.srt.managers.schedule_batch", "Req")
    by_length, by_slots = (members(request.__name__, p.__name__) for p in (PrefillByLength, PrefillBySlots))
    assert (by_length <= theirs) != (by_slots <= theirs)
    assert ("prefix_len" in theirs) is (by_length <= theirs)
