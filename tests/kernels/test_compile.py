"""Every kernel compiles to machine code of the GPUs that are supported, on a machine without one."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import hardkv_sglang

pytestmark = pytest.mark.slow

KERNELS = Path(hardkv_sglang.__file__).parent / "kernels"


@pytest.mark.parametrize("architecture", [80, 90], ids=["A100", "H100"])
def test_every_kernel_compiles(architecture: int) -> None:
    script = Path(__file__).with_name("compile_all.py")
    done = subprocess.run(
        [sys.executable, str(script), str(architecture)], capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    compiled = {line.split(":")[0] for line in done.stdout.splitlines()}
    assert compiled == {
        name for file in KERNELS.glob("*.py") for name in re.findall(r"def (\w+_kernel)\(", file.read_text())
    }
