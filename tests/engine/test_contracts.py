"""The contracts of docs/design.md, "Contracts with SGLang": each on SGLang's own classes."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
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
