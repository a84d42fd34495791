"""The wheel of this tree, installed into an environment that has SGLang and not this checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SOURCES = ("hardkv_sglang", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `pip wheel .` builds it, from a copy: the build would leave files in the checkout."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    run([sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--quiet", "--wheel-dir", str(target)], source)
    (built,) = target.iterdir()
    return built


@pytest.fixture(scope="module")
def clean(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Root of a virtual environment with the wheel, over the packages of this one."""
    root = tmp_path_factory.mktemp("environment")
    venv.create(root, with_pip=False)
    python = str(root / "bin" / "python")
    run([sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", str(wheel)], root)
    # after its own packages; the checkout, installed in ours as editable, does not come along
    site = Path(run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], root).strip())
    (site / "sglang_environment.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return root


def run(command: list[str], folder: Path) -> str:
    """Standard output of a command that succeeds."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    done = subprocess.run(command, cwd=folder, env=kept, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_wheel_has_every_file_of_the_package(wheel: Path) -> None:
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("hardkv_sglang/")}
    files = (
        file for file in (ROOT / "hardkv_sglang").rglob("*") if file.is_file() and file.parent.name != "__pycache__"
    )
    assert packed == {file.relative_to(ROOT).as_posix() for file in files}


def test_command_runs_from_the_wheel(clean: Path) -> None:
    text = run([str(clean / "bin" / "hardkv"), "--help"], clean)
    assert all(name in text for name in ("calibrate", "demo", "doctor", "eval", "model", "top"))


def test_server_has_the_flag_from_the_wheel(clean: Path) -> None:
    program = (
        "import runpy, sys, hardkv_sglang\n"
        "print(hardkv_sglang.__file__, flush=True)\n"
        "sys.argv = ['launch_server', '--help']\n"
        "runpy.run_module('sglang.launch_server', run_name='__main__')\n"
    )
    text = run([str(clean / "bin" / "python"), "-c", program], clean)
    assert Path(text.splitlines()[0]).is_relative_to(clean)
    assert "--kv-compression" in text
