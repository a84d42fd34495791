"""Results of a kernel benchmark as JSON: figures, versions, hardware."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.machine import environment

ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "triton", "flashinfer-python")


def write_report(path: Path, rows: Sequence[dict[str, Any]], copy_bytes_per_s: float) -> None:
    """Write the rows of a run and what they were measured on."""
    report = {**environment(ROOT, PACKAGES), "copy_bytes_per_s": copy_bytes_per_s, "rows": rows}
    path.write_text(json.dumps(report, indent=1))
