"""The fields of SGLang's requests that we name are fields of SGLang's classes, read from its sources."""

from __future__ import annotations

import ast
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from hardkv_sglang.engine import request
from hardkv_sglang.engine.request import KVInfo, Request, Sampling, TreeNode


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
        (TreeNode, "sglang.srt.mem_cache.radix_cache", "TreeNode"),
        (Sampling, "sglang.srt.sampling.sampling_params", "SamplingParams"),
    ],
)
def test_sglang_has_what_we_name(protocol: type, module: str, name: str) -> None:
    ours = members(request.__name__, protocol.__name__)
    assert ours
    assert ours <= members(module, name)
