"""The proposals in `patches/` apply to the release that they name, and what they add is Python."""

from __future__ import annotations

import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from hardkv_sglang.engine.reviewed_sources import RELEASES, installed_release

PATCHES = sorted((Path(__file__).parents[1] / "patches").glob("*.patch"))


def release_of(patch: Path) -> str:
    named = re.search(r"^Against: (\S+)$", patch.read_text(), re.MULTILINE)
    assert named is not None, f"{patch.name} names no release"
    return named[1]


def changed_files(patch: Path) -> list[str]:
    """Files that exist before the patch, below the folder that has the package."""
    return re.findall(r"^--- a/python/(\S+)$", patch.read_text(), re.MULTILINE)


def test_there_are_patches_against_reviewed_releases() -> None:
    assert PATCHES
    assert {release_of(patch) for patch in PATCHES} <= set(RELEASES)


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_patch_applies(patch: Path, tmp_path: Path) -> None:
    if release_of(patch) != installed_release():
        pytest.skip(f"against {release_of(patch)}")
    package = find_spec("sglang")
    assert package is not None and package.submodule_search_locations is not None
    site = Path(package.submodule_search_locations[0]).parent
    # a copy, outside of every repository: inside one, git passes over files that it does not know
    for name in changed_files(patch):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(site / name, tmp_path / name)
    command = ["git", "apply", "-p2", "--verbose", str(patch)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Applied patch") == len(re.findall(r"^\+\+\+ b/", patch.read_text(), re.MULTILINE))
    for file in tmp_path.rglob("*.py"):
        compile(file.read_text(), str(file), "exec")
