"""The contracts of docs/design.md, "Contracts with SGLang": each on SGLang's own classes."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DESIGN = ROOT / "docs" / "design.md"
HOOKS = ROOT / "hardkv_sglang" / "engine" / "hooks.py"
SCRIPT = Path(__file__).with_name("contract_cases.py")


def case_names() -> list[str]:
    """Names in `CASES`, read without importing SGLang into this process."""
    for node in ast.parse(SCRIPT.read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "CASES":
            assert isinstance(node.value, ast.Tuple)
            return [name.id for name in node.value.elts if isinstance(name, ast.Name)]
    raise AssertionError(f"{SCRIPT} has no CASES")


@pytest.fixture(scope="module")
def failures() -> dict[str, str | None]:
    """What went wrong in each case; all in one process, whose start takes longer than the cases."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", case_names())
def test_contract(failures: dict[str, str | None], name: str) -> None:
    assert failures[name] is None, failures[name]


def hooked_names() -> list[str]:
    """Last names of the hooked functions, from the table in hooks.py."""
    calls = (n for n in ast.walk(ast.parse(HOOKS.read_text())) if isinstance(n, ast.Call))
    targets = [c.args[0] for c in calls if isinstance(c.func, ast.Name) and c.func.id == "Hook"]
    return [str(t.value).rpartition(".")[2] for t in targets if isinstance(t, ast.Constant)]


def test_every_hook_has_a_row_and_every_row_a_test() -> None:
    table = DESIGN.read_text().split("### What each hook may rely on", 1)[1].split("\n### ", 1)[0]
    rows = [[cell.strip() for cell in line.split(" | ")] for line in table.splitlines() if line.startswith("| `")]
    named = re.findall(r"`(\w+)`", " ".join(row[0] for row in rows))
    assert sorted(named) == sorted(hooked_names())
    tests = [name for row in rows for name in re.findall(r"`([\w/.]+)`", row[2])]
    assert all(re.search(r"`[\w/.]+`", row[2]) for row in rows)
    assert {name for name in tests if "/" not in name} == set(case_names())
    assert [name for name in tests if "/" in name and not (ROOT / name).exists()] == []
