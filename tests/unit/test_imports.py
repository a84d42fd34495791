"""Who may import what: the arrows of the package."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "hardkv_sglang"
MAY_IMPORT_SGLANG = {"plugin.py", "hooks.py", "compat.py", "memory_pool/pool.py"}


def imported_modules(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names.add(node.module)
    return names


def test_sglang_is_imported_in_few_files() -> None:
    for file in PACKAGE.rglob("*.py"):
        name = file.relative_to(PACKAGE).as_posix()
        if name in MAY_IMPORT_SGLANG or name.startswith(("platform/", "backends/")):
            continue
        assert not [m for m in imported_modules(file) if m.split(".")[0] == "sglang"], name


def test_the_rule_imports_nothing_of_the_runtime() -> None:
    allowed = {"config", "selection", "importance", "calibration", "policies", "memory_pool.layout"}
    for name in ("selection.py", "importance.py", "calibration.py"):
        ours = {m.removeprefix("hardkv_sglang.") for m in imported_modules(PACKAGE / name) if "hardkv_sglang" in m}
        assert ours <= allowed, name


def test_importing_the_package_loads_nothing() -> None:
    code = "import sys, hardkv_sglang; assert not {'torch', 'sglang'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
