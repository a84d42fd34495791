"""A real SGLang server in a process group of its own: started, awaited, asked and stopped.

Used by the demo, the benchmarks and the tests, which add their own flags.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import openai
import requests

Flags = Mapping[str, Any]
OnWait = Callable[[float, str], None]

START_TIMEOUT_S = 420.0  # 75 s alone on two cores, a multiple of it when they are shared
STOP_TIMEOUT_S = 20.0
REQUEST_TIMEOUT_S = 1800.0
PR_SET_PDEATHSIG = 1
# below those that Linux gives outgoing connections (from 32768); random, so that two programs rarely choose the same
SERVER_PORTS = range(20000, 31000)
PORT_ATTEMPTS = 100


class ServerError(Exception):
    """The server did not start, died or refused a request; the message ends with its log."""


class ServerProcess:
    """One running `python -m sglang.launch_server`."""

    def __init__(self, model: Path, flags: Flags, env: Mapping[str, str], log_path: Path) -> None:
        """Start the process; `wait_ready` returns when it serves.

        flags: without the leading dashes; True is a bare flag, None leaves a default out.
        """
        self.model = model
        self.flags = dict(flags)
        self.log_path = log_path
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._process = self._launch(env)
        self._stopped = False

    def _launch(self, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
        self._arguments = ["--model-path", str(self.model), *command_line(self.flags)]
        command = [sys.executable, "-m", "sglang.launch_server", *self._arguments]
        command += ["--host", "127.0.0.1", "--port", str(self.port)]
        if int(self.flags.get("dp-size") or 1) == 1:
            # SGLang's own choice is open to connections of other programs until its workers listen; but it gives each
            # data-parallel replica a port, and a port that is named would be that of all
            command += ["--nccl-port", str(free_port())]
        with self.log_path.open("wb") as log:
            return subprocess.Popen(
                command,
                env={**os.environ, **env},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )

    def wait_ready(self, on_wait: OnWait | None = None, timeout_s: float = START_TIMEOUT_S) -> None:
        """Return once the server answers `/health`.

        on_wait: called twice a second with the seconds waited and the last log line.
        Raises `ServerError` if the server exits or is too slow.
        """
        start = time.monotonic()
        while not self._is_healthy():
            self.check_alive()
            waited = time.monotonic() - start
            if waited > timeout_s:
                raise self._error(f"not ready after {timeout_s:.0f} s")
            if on_wait is not None:
                on_wait(waited, self.last_log_line())
            time.sleep(0.5)

    def last_log_line(self) -> str:
        """The newest line of the log, for progress displays."""
        lines = self.log_text().split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

    @property
    def pid(self) -> int:
        """Process that was started; its children are the server's other processes."""
        return self._process.pid

    def command_text(self) -> str:
        """The command as one would type it."""
        return shlex.join(["python", "-m", "sglang.launch_server", *self._arguments])

    def _is_healthy(self) -> bool:
        try:
            return requests.get(f"{self.url}/health", timeout=30).status_code == 200
        except requests.RequestException:
            return False

    @property
    def is_alive(self) -> bool:
        """Whether the launcher still runs; it ends when any of its processes fails."""
        return self._process.poll() is None

    def check_alive(self) -> None:
        """Raise `ServerError` with the end of the log if the server has ended."""
        if not self.is_alive:
            raise self._error(f"exited with status {self._process.returncode}")

    def wait_exit(self, timeout_s: float = START_TIMEOUT_S) -> int:
        """Exit status of a server that is expected to end by itself, as one that refuses its flags."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            raise self._error(f"still running after {timeout_s:.0f} s") from error

    def log_text(self) -> str:
        """Everything that the server has printed so far."""
        return self.log_path.read_text(errors="replace")

    def client(self) -> openai.OpenAI:
        """OpenAI SDK client of this server."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="unused", timeout=REQUEST_TIMEOUT_S, max_retries=0)

    def generate(self, **payload: Any) -> Any:
        """Reply of `/generate`, for example `generate(text=..., sampling_params={...})`."""
        return self._request("POST", "/generate", json=payload).json()

    def server_info(self) -> dict[str, Any]:
        """Resolved arguments, pool sizes and `internal_states` of the scheduler."""
        return self._request("GET", "/server_info").json()

    def flush_cache(self) -> None:
        """Empty the radix cache, waiting for running requests first."""
        self._request("POST", "/flush_cache", params={"timeout": 60})

    def abort(self, rid: str = "", *, abort_all: bool = False) -> None:
        """Abort the request with this id, or all."""
        self._request("POST", "/abort_request", json={"rid": rid, "abort_all": abort_all})

    def start_profile(self, folder: str, num_steps: int) -> None:
        """Profile the next forward passes with torch's profiler; it stops by itself and writes a trace to `folder`."""
        options = {"activities": ["CPU", "GPU"], "with_stack": False, "record_shapes": False}
        self._request("POST", "/start_profile", json={"output_dir": folder, "num_steps": num_steps, **options})

    def num_requests(self) -> int:
        """Requests that run or wait."""
        loads = self._request("GET", "/v1/loads").json()["loads"]
        return sum(load["num_running_reqs"] + load["num_waiting_reqs"] for load in loads)

    def check_idle(self, timeout_s: float = 60.0) -> None:
        """Wait until nothing runs and let SGLang's leak checks, which run when idle, pass.

        A leak ends the scheduler and with it the server. Raises `ServerError`.
        """
        deadline = time.monotonic() + timeout_s
        while self.num_requests() > 0:
            if time.monotonic() > deadline:
                raise self._error(f"requests still run after {timeout_s:.0f} s")
            time.sleep(0.2)
        # the checks run in the first loop without work; time for that, then proof that the scheduler survived
        time.sleep(0.5)
        self.generate(input_ids=[1], sampling_params={"max_new_tokens": 1})
        self.check_alive()
        if "leak detected" in self.log_text():
            raise self._error("a leak was reported")

    def _request(self, method: str, path: str, **options: Any) -> requests.Response:
        try:
            response = requests.request(method, self.url + path, timeout=REQUEST_TIMEOUT_S, **options)
        except requests.RequestException as error:
            raise self._error(f"{method} {path}: {error}") from error
        if not response.ok:
            raise self._error(f"{method} {path}: {response.status_code} {response.text[:2000]}")
        return response

    def _error(self, what: str) -> ServerError:
        tail = "\n".join(self.log_text().splitlines()[-60:])
        flags = " ".join(command_line(self.flags))
        return ServerError(f"server ({flags}): {what}\n--- end of {self.log_path}\n{tail}")

    def stop(self) -> None:
        """End every process of the server; safe to call twice."""
        if self._stopped:
            return  # the number of the group may belong to others by now
        self._signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_TIMEOUT_S)
        # also when the launcher has ended: its children may outlive it
        self._signal(signal.SIGKILL)
        self._process.wait()
        self._stopped = True

    def _signal(self, number: signal.Signals) -> None:
        # no such process: the whole group has ended
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


def command_line(flags: Flags) -> list[str]:
    """Flags as arguments; True is a bare flag, None is left out."""
    words: list[str] = []
    for name, value in flags.items():
        if value is not None:
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


def free_port() -> int:
    """A TCP port that nothing uses now and that the kernel gives no connection in the minute until the server listens.

    Raises `ServerError` if none of `PORT_ATTEMPTS` random ones is free.
    """
    for _ in range(PORT_ATTEMPTS):
        port = random.choice(SERVER_PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise ServerError(f"none of {PORT_ATTEMPTS} ports tried in {SERVER_PORTS.start}-{SERVER_PORTS.stop - 1} is free")


def die_with_parent() -> None:
    """Ask the kernel to end this process when the test run is killed, so that no server is orphaned."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
