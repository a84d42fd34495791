"""Fixtures that every test directory may use."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from hardkv_sglang.cli.demo_model import demo_model_path
from hardkv_sglang.engine.reviewed_sources import NEWEST

if TYPE_CHECKING:
    from e2e.server import ServerPool

    from hardkv_sglang.cli.server_process import ServerProcess as Server

EMPTY: Mapping[str, str] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    """How many hostile requests are sent, and which; how long a conversation is."""
    parser.addoption("--hostile-cases", default="100", help="of tests/e2e/test_hostile_input.py (default: 100)")
    parser.addoption("--hostile-seed", default="0", help="of these cases (default: 0)")
    parser.addoption("--chain-turns", default="150", help="of tests/e2e/test_adversarial_chain.py (default: 150)")


def pytest_configure() -> None:
    """Without a CUDA device, run kernels in Triton's interpreter: in this process only, servers start as users start
    them."""
    if torch.cuda.is_available():
        return
    # small tensors: threads that wait for each other cost more than they compute, most of all beside a server
    torch.set_num_threads(1)
    # Triton decides when a function is decorated, and decorates its own library on import: any test module may be
    # the first to import it
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TRITON_INTERPRET", "1")
        import triton
    triton.knobs.propagate_env = False
    triton.knobs.runtime.interpret = True


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that drive a server and run them last: a failing unit test explains more and sooner.

    Each file is a group for one worker, unless it names another; the largest come first, so that both workers end
    together.
    """
    for item in items:
        if "server_pool" in getattr(item, "fixturenames", ()) or item.path.parent.name == "e2e":
            item.add_marker("e2e")
        elsewhere = "cpu" if torch.cuda.is_available() else "gpu"
        if item.get_closest_marker(elsewhere):
            item.add_marker(pytest.mark.skip(reason=f"{elsewhere}: see the markers in pyproject.toml"))
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
    sizes = Counter(map(group_of, items))
    items.sort(key=lambda item: (item.get_closest_marker("e2e") is not None, -sizes[group_of(item)]))


def group_of(item: pytest.Item) -> str:
    """Name of the tests that share a worker, and with it servers."""
    marker = item.get_closest_marker("xdist_group")
    assert marker is not None
    return marker.args[0]


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """Folder of the demo model, converted on first use; or another model, for kernels that only it has."""
    given = os.environ.get("HARDKV_TEST_MODEL")
    return Path(given) if given else demo_model_path()


@pytest.fixture
def unreviewed_release(tmp_path: Path) -> Path:
    """Folder named after the release that follows the reviewed ones; first on the path, SGLang looks like that one."""
    *start, last = NEWEST.split(".")
    release = ".".join([*start, str(int(last) + 1)])
    metadata = tmp_path / release / f"sglang-{release}.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: sglang\nVersion: {release}\n")
    return metadata.parent


@pytest.fixture(scope="session")
def server_pool(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerPool]:
    """All servers of the session; ended with it."""
    from e2e.server import ServerPool

    pool = ServerPool(demo_model, tmp_path_factory.mktemp("servers"))
    yield pool
    pool.stop_all()


@pytest.fixture
def server_for(server_pool: ServerPool) -> Iterator[Callable[..., Server]]:
    """`server_for({"flag": value}, {"ENV": "value"})`: a ready server; same arguments, same server.

    A test fails if a server that it used has died by its end.
    """
    used: list[Server] = []

    def get(flags: Mapping[str, Any] = EMPTY, env: Mapping[str, str] = EMPTY) -> Server:
        used.append(server_pool.get(flags, env))
        return used[-1]

    yield get
    for server in used:
        server.check_alive()
