"""SGLang's own load generator, as a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.serving.cells import Cell
from hardkv_sglang.cli.server_process import die_with_parent

FIGURES = {
    "seconds": "duration",
    "output_tokens_per_second": "output_throughput",
    "requests_per_second": "request_throughput",
    "output_tokens": "total_output_tokens",
    "ttft_p50_ms": "median_ttft_ms",
    "ttft_p99_ms": "p99_ttft_ms",
    "tpot_p50_ms": "median_tpot_ms",
    "tpot_p99_ms": "p99_tpot_ms",
}
"""Our names of the figures, and the client's."""
STOP_TIMEOUT_S = 10.0


class ClientError(Exception):
    """The load generator failed, or requests did; the message ends with what it printed."""


class Client:
    """One running `python -m sglang.benchmark.serving`."""

    def __init__(self, url: str, model: Path, cell: Cell, folder: Path) -> None:
        """Start the process. It ignores end tokens, so outputs have the length that is asked for."""
        self._cell = cell
        self._out, self._log_path = folder / f"{cell.stem}.jsonl", folder / f"{cell.stem}.client.log"
        self._out.unlink(missing_ok=True)  # the client appends
        command = [sys.executable, "-m", "sglang.benchmark.serving", *self._arguments(url, model)]
        with self._log_path.open("wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, preexec_fn=die_with_parent
            )

    def _arguments(self, url: str, model: Path) -> list[str]:
        return [
            "--backend=sglang",
            f"--base-url={url}",
            f"--model={model}",
            f"--tokenizer={model}",
            "--warmup-requests=0",  # the runner warms up, and empties the radix cache afterwards
            "--disable-tqdm",
            f"--seed={self._cell.round}",
            f"--output-file={self._out}",
            *self._cell.workload.arguments(self._cell.clients),
        ]

    @property
    def is_running(self) -> bool:
        """Whether it still sends or waits."""
        return self._process.poll() is None

    def stop(self) -> None:
        """End the process; safe when it has ended."""
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def figures(self) -> dict[str, float]:
        """What it measured. Raises `ClientError` if it or any of its requests failed."""
        if self._process.returncode != 0 or not self._out.is_file():
            raise self._error(f"ended with status {self._process.returncode}")
        result: dict[str, Any] = json.loads(self._out.read_text())
        expected = self._cell.workload.num_requests(self._cell.clients)
        if result["completed"] != expected:
            raise self._error(f"{result['completed']} of {expected} requests succeeded")
        return {ours: float(result[theirs]) for ours, theirs in FIGURES.items()}

    def _error(self, what: str) -> ClientError:
        tail = "\n".join(self._log_path.read_text(errors="replace").splitlines()[-30:])
        return ClientError(f"client ({self._cell.title}): {what}\n--- end of {self._log_path}\n{tail}")
