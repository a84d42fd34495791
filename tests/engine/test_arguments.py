"""Our options travel through SGLang's own argument handling, in every way a user can give them."""

from __future__ import annotations

import argparse
import copy
import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import ServerArgs, prepare_server_args

from hardkv_sglang.config import HardKVConfig
from hardkv_sglang.engine import arguments, compat
from hardkv_sglang.plugin import build_server_args

OPTIONS = {"top_p": 0.75, "max_tokens": 512}
WANT = HardKVConfig(top_p=0.75, max_tokens=512)


@pytest.fixture(autouse=True)
def plugins() -> None:
    load_plugins()


@pytest.fixture
def command(demo_model: Path) -> list[str]:
    return ["--model-path", str(demo_model)]


def test_command_line_reaches_server_args(command: list[str]) -> None:
    args = prepare_server_args([*command, "--kv-compression", "hardkv", "--kv-compression-config", json.dumps(OPTIONS)])
    assert arguments.attached_options(args) == WANT
    flags = compat.resolve(args)
    assert (flags.page_size, flags.max_running_requests, flags.device) == (32, 256, "cpu")
    assert arguments.attached_options(args) == WANT


def test_options_survive_the_way_to_the_scheduler(command: list[str]) -> None:
    args = prepare_server_args([*command, "--kv-compression", "hardkv", "--kv-compression-config", json.dumps(OPTIONS)])
    compat.resolve(args)
    for copied in (pickle.loads(pickle.dumps(args)), copy.deepcopy(args)):
        assert arguments.attached_options(copied) == WANT


@pytest.mark.parametrize("nested", [OPTIONS, json.dumps(OPTIONS)], ids=["mapping", "text"])
def test_yaml_file(command: list[str], tmp_path: Path, nested: Any) -> None:
    file = tmp_path / "server.yaml"
    # JSON is YAML
    file.write_text(json.dumps({"kv-compression": "hardkv", "kv-compression-config": nested}))
    assert arguments.attached_options(prepare_server_args([*command, "--config", str(file)])) == WANT


def test_engine_arguments(demo_model: Path) -> None:
    args = build_server_args(model_path=str(demo_model), kv_compression="hardkv", kv_compression_config=OPTIONS)
    assert isinstance(args, ServerArgs)
    assert arguments.attached_options(args) == WANT
    assert args.page_size == 32


def test_a_namespace_that_sglangs_parser_did_not_make(command: list[str]) -> None:
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    namespace = parser.parse_args(command)
    del namespace.kv_compression, namespace.kv_compression_config
    args = ServerArgs.from_cli_args(namespace)
    assert arguments.attached_options(args) is None


def test_without_the_flag_nothing_is_attached_or_seeded(command: list[str]) -> None:
    args = prepare_server_args(command)
    assert arguments.attached_options(args) is None
    assert compat.resolve(args).max_running_requests is None
    args.check_server_args()


def test_refusals_come_with_the_launchers_check(command: list[str]) -> None:
    args = prepare_server_args([*command, "--kv-compression", "hardkv", "--page-size", "1", "--enable-mixed-chunk"])
    compat.resolve(args)
    with pytest.raises(ValueError, match="--page-size") as error:
        args.check_server_args()
    assert "--enable-mixed-chunk" in str(error.value)


@pytest.mark.parametrize(("bits", "device", "is_refused"), [(4, "cuda", True), (8, "cuda", True), (4, "cpu", False)])
def test_fewer_bits_are_refused_on_a_gpu(
    command: list[str], monkeypatch: pytest.MonkeyPatch, bits: int, device: str, is_refused: bool
) -> None:
    options = json.dumps({"survivor_bits": bits})
    args = prepare_server_args([*command, "--kv-compression", "hardkv", "--kv-compression-config", options])
    flags = compat.resolve(args)
    on_device = SimpleNamespace(device=device, attention_backend={"cuda": "flashinfer", "cpu": "torch_native"}[device])
    monkeypatch.setattr(compat, "resolved_flags", lambda _: Overlaid(on_device, flags))
    if not is_refused:
        arguments.refuse_unsupported(args)
        return
    with pytest.raises(ValueError, match=rf"survivor_bits={bits} .*leave out survivor_bits, or use --device cpu"):
        arguments.refuse_unsupported(args)


class Overlaid:
    """Flags with some others in front of them."""

    def __init__(self, front: object, behind: object) -> None:
        self.front, self.behind = front, behind

    def __getattr__(self, name: str) -> object:
        return getattr(self.front if hasattr(self.front, name) else self.behind, name)


@pytest.mark.parametrize(
    ("given", "largest"),
    [
        ({}, 256),
        ({"max_running_requests": 48}, 48),
        ({"max_running_requests": 4096}, 512),
        ({"cuda_graph_max_bs_decode": 8}, 8),
    ],
    ids=str,
)
def test_graphs_reach_the_batch_sizes_that_compression_reaches(given: dict[str, Any], largest: int) -> None:
    arguments.seed_defaults(given, device_is_cuda=True)
    assert given["cuda_graph_max_bs_decode"] == largest


def test_graph_flags_are_sglangs(command: list[str]) -> None:
    args = prepare_server_args([*command, "--kv-compression", "hardkv", "--cuda-graph-max-bs-decode", "24"])
    assert compat.resolve(args).cuda_graph_max_bs_decode == 24
    # without a GPU there are no graphs to capture
    args = prepare_server_args([*command, "--kv-compression", "hardkv"])
    assert compat.resolve(args).cuda_graph_max_bs_decode is None
