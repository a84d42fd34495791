"""Servers of a test session."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch

from hardkv_sglang.cli.server_process import Flags, ServerError, ServerProcess

# with a GPU as in production: CUDA graphs and FlashInfer, which takes 16-bit types only
DEVICE_FLAGS: Flags = (
    {
        "dtype": "bfloat16",
        "attention-backend": "flashinfer",
        "mem-fraction-static": 0.15,
        "cuda-graph-max-bs-decode": 16,
    }
    if torch.cuda.is_available()
    else {"dtype": "float32"}
)
# enough for a handful of requests of the demo model's full context, 180 MB of K and V in float32; an idle server that
# does not sleep would keep a whole core from the one that is being tested
DEFAULT_FLAGS: Flags = MappingProxyType(
    {
        **DEVICE_FLAGS,
        "page-size": 32,
        "max-total-tokens": 8192,
        "max-running-requests": 16,
        "random-seed": 0,
        "sleep-on-idle": True,
    }
)


# threads that wait for each other at every operation: as soon as anything else runs, one core does more than two
DEFAULT_ENV = MappingProxyType({"OMP_NUM_THREADS": "1"})
# each takes some gigabytes: more would make the machine swap
MAX_RUNNING = 2 if "PYTEST_XDIST_WORKER" in os.environ else 4


class ServerPool:
    """Servers of one test session: the same flags and environment give the same server while it is kept."""

    def __init__(self, model: Path, log_folder: Path) -> None:
        self._model = model
        self._log_folder = log_folder
        self._servers: dict[str, ServerProcess] = {}

    def get(self, flags: Flags, env: Mapping[str, str]) -> ServerProcess:
        """A ready server, started on first use and again if it has died; the one that rested longest makes room."""
        key = repr((sorted(flags.items()), sorted(env.items())))
        server = self._servers.pop(key, None)
        if server is None or not server.is_alive:
            self._make_room()
            server = self.launch(flags, env)
            self._wait_ready(server)
        self._servers[key] = server  # last in order: used last
        return server

    def _make_room(self) -> None:
        while len(self._servers) >= MAX_RUNNING:
            self._servers.pop(next(iter(self._servers))).stop()

    def launch(self, flags: Flags, env: Mapping[str, str]) -> ServerProcess:
        """A server that is neither awaited nor shared; the caller stops it."""
        number = len(list(self._log_folder.iterdir()))
        log = self._log_folder / f"server-{number}.log"
        return ServerProcess(self._model, {**DEFAULT_FLAGS, **flags}, {**DEFAULT_ENV, **env}, log)

    def _wait_ready(self, server: ServerProcess) -> None:
        try:
            server.wait_ready()
        except ServerError:
            server.stop()
            raise

    def stop_all(self) -> None:
        """End all servers."""
        for server in self._servers.values():
            server.stop()
