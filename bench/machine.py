"""What a measurement ran on: commit, versions, processor and accelerator."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def environment(root: Path, packages: Sequence[str]) -> dict[str, str]:
    """Commit of the work tree at `root`, versions of those packages that are installed, and the machine."""
    accelerator = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        "commit": read_commit(root),
        "python": platform.python_version(),
        **installed_versions(packages),
        "machine": f"{cpu_name()}, {platform.machine()}, {platform.system()} {platform.release()}",
        **accelerator,
    }


def installed_versions(packages: Sequence[str]) -> dict[str, str]:
    """Version by name; a package that is not installed is left out."""
    versions = {}
    for name in packages:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def cpu_name() -> str:
    """Model name of the processor, as Linux tells it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()


def read_commit(root: Path) -> str:
    """The commit that is checked out, with `-dirty` when Python files differ from it; `unknown` outside of git."""
    try:
        commit = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no", "--", "*.py")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit}-dirty" if changed else commit


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
