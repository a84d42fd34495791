"""Who may import what: the arrows between the folders of the package, and where SGLang is known."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "hardkv_sglang"

MAY_IMPORT = {
    "plugin.py": {"engine"},
    "engine": {
        "events",
        "kernels",
        "observability",
        "lifecycle",
        "selection",
        "memory_pool",
        "config.py",
        "generated.py",
    },
    "events": {"kernels", "lifecycle", "selection", "memory_pool"},
    "kernels": {"lifecycle", "selection", "memory_pool"},
    "observability": {"lifecycle", "generated.py"},
    "lifecycle": {"memory_pool"},
    "selection": {"config.py"},
    "memory_pool": {"config.py"},
    "config.py": {"generated.py"},
    "generated.py": set(),
    "cli": {"engine", "selection", "config.py"},  # engine/preflight, which `hardkv doctor` shows
    "__init__.py": set(),
}
"""For each folder or file of the package, those that it may import. An arrow that is not here needs a reason."""

MAY_IMPORT_SGLANG = ("plugin.py", "engine/", "memory_pool/pool.py")


def imported_modules(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def room_of(path: Path) -> str:
    """The folder of the package, or the file in its root, that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0]


def imported_rooms(file: Path) -> set[str]:
    rooms = set()
    for module in imported_modules(file):
        package, _, rest = module.partition(".")
        first = rest.split(".")[0]
        if package != PACKAGE.name or not first:
            continue
        if (PACKAGE / first).is_dir():
            rooms.add(first)
        elif (PACKAGE / f"{first}.py").exists():
            rooms.add(f"{first}.py")
    return rooms


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(PACKAGE).as_posix())
def test_arrows_go_down(file: Path) -> None:
    room = room_of(file)
    assert imported_rooms(file) - {room} <= MAY_IMPORT[room]


def test_the_table_of_arrows_has_no_circle_and_names_what_exists() -> None:
    assert set(MAY_IMPORT) == {room_of(file) for file in FILES}
    order = list(MAY_IMPORT)
    for below in MAY_IMPORT.values():
        assert below <= set(order)
    remaining = {room: set(below) for room, below in MAY_IMPORT.items()}
    while remaining:
        leaves = {room for room, below in remaining.items() if not below & set(remaining)}
        assert leaves, f"a circle among {sorted(remaining)}"
        for room in leaves:
            del remaining[room]


def test_the_table_of_arrows_has_no_arrow_that_nobody_uses() -> None:
    used: dict[str, set[str]] = {room: set() for room in MAY_IMPORT}
    for file in FILES:
        used[room_of(file)] |= imported_rooms(file) - {room_of(file)}
    assert used == MAY_IMPORT


def test_sglang_is_imported_in_few_files() -> None:
    for file in FILES:
        name = file.relative_to(PACKAGE).as_posix()
        if not name.startswith(MAY_IMPORT_SGLANG):
            assert not [m for m in imported_modules(file) if m.split(".")[0] == "sglang"], name


def test_importing_the_package_loads_nothing() -> None:
    code = "import sys, hardkv_sglang; assert not {'torch', 'sglang'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
