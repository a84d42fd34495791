"""Options: validation, sources, and the table in docs/options.md."""

from __future__ import annotations

import argparse
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from hardkv_sglang.config import HardKVConfig, options_table
from hardkv_sglang.engine import arguments
from hardkv_sglang.generated import insert_generated, write_or_print
from hardkv_sglang.memory_pool.layout import PoolLayout
from hardkv_sglang.memory_pool.resolved_config import ResolvedConfig

DOCUMENT = Path(__file__).parents[1] / "docs" / "options.md"


def test_document_lists_the_options() -> None:
    assert insert_generated(DOCUMENT.read_text(), "options", options_table()) == DOCUMENT.read_text()


def test_table_is_written_in_place(tmp_path: Path) -> None:
    document = tmp_path / "options.md"
    document.write_text("before\n<!-- options: by hand -->\nold\n<!-- options end -->\nafter\n")
    write_or_print("options", options_table(), ["--write", str(document)])
    assert document.read_text() == (
        f"before\n<!-- options: by hand -->\n{options_table()}\n<!-- options end -->\nafter\n"
    )
    with pytest.raises(ValueError, match="expected one pair of markers"):
        insert_generated("no markers", "options", options_table())


@pytest.mark.parametrize("f", fields(HardKVConfig), ids=lambda f: f.name)
def test_every_option_is_checked(f: Any) -> None:
    meta = f.metadata
    bad: list[Any] = ["no such choice", 4.0, [4], True] if meta["choices"] else [12, True]
    if meta["low"] is not None:
        bad = [meta["low"] - 1, meta["high"] + 1, "12", True]
    for value in bad:
        with pytest.raises(ValueError, match=f"^{f.name}="):
            HardKVConfig(**{f.name: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recent_tokens": 32, "query_window": 64, "select_interval": 64}, "recent_tokens=32 must be at least"),
        ({"select_interval": 16}, "select_interval=16 must be at least"),
        ({"min_tokens": 5000}, "min_tokens=5000 exceeds max_tokens"),
        ({"pooling_width": 4}, "pooling_width=4 must be odd"),
        ({"topp": 0.9}, "unknown option 'topp'; known: policy, metric"),
    ],
)
def test_refused_combinations(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HardKVConfig.from_mapping(options)


def test_sources_agree(tmp_path: Path) -> None:
    options = {"top_p": 0.8, "max_tokens": None}
    file = tmp_path / "options.json"
    file.write_text(json.dumps(options))
    want = HardKVConfig(top_p=0.8, max_tokens=None)
    assert (
        HardKVConfig.parse(options) == HardKVConfig.parse(json.dumps(options)) == HardKVConfig.parse(str(file)) == want
    )
    assert HardKVConfig.from_mapping(want.to_dict()) == want


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.json", "neither a JSON object nor a readable file"),
        ("{bad", "not valid JSON"),
        ("{}[]", "not valid JSON"),
        ('{"top_p":' + "[" * 100_000, "not valid JSON"),
        ("[1]", "neither a JSON object nor a readable file"),
        ("x" * 100_000, "neither a JSON object nor a readable file"),
        ("a\0b", "neither a JSON object nor a readable file"),
        ("~nobody-has-this-name/x", "neither a JSON object nor a readable file"),
        ("/", "neither a JSON object nor a readable file"),
        (Path("nowhere.json"), "neither a JSON object nor a readable file"),
        (5, "must be a mapping, a JSON object or the path of a JSON file, not int"),
        (True, "not bool"),
        (["top_p"] * 100_000, "not list"),
        (b"{}", "not bytes"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_unreadable_sources(source: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"kv_compression_config.*{message}") as caught:
        HardKVConfig.parse(source)
    assert len(str(caught.value)) < 400


def test_sources_of_other_encodings_and_keys(tmp_path: Path) -> None:
    file = tmp_path / "options.json"
    file.write_bytes(b"{\xff}")
    with pytest.raises(ValueError, match="nor a readable file"):
        HardKVConfig.parse(file)
    file.write_text('{"top_p": 0.7}')
    assert HardKVConfig.parse(file) == HardKVConfig(top_p=0.7)
    given: dict[Any, Any] = {3: 1, "x" * 100_000: 2, None: 3}
    with pytest.raises(ValueError, match="unknown option 3, 'x") as caught:
        HardKVConfig.parse(given)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", ["policy", "top_p", "priors"])
def test_long_values_are_shortened(name: str) -> None:
    for value in ("x" * 1_000_000, ["x"] * 1_000_000, {"a": ["x" * 1_000_000]}, float("nan"), b"x" * 1_000_000):
        if name == "priors" and isinstance(value, str):
            continue
        with pytest.raises(ValueError, match=f"^{name}=") as caught:
            HardKVConfig.from_mapping({name: value})
        assert len(str(caught.value)) < 400


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    arguments.add_arguments(parser)
    assert "--kv-compression {none,hardkv}" in parser.format_help()
    args = parser.parse_args(["--kv-compression", "hardkv", "--kv-compression-config", '{"top_p": 0.7}'])
    options = arguments.resolve_options(args.kv_compression, args.kv_compression_config)
    assert options == HardKVConfig(top_p=0.7)
    assert arguments.resolve_options("none", None) is None
    with pytest.raises(SystemExit):
        parser.parse_args(["--kv-compression-config", '{"top_p": 7}'])
    assert "top_p=7 is out of range: 0.01 .. 1 (probability)" in capsys.readouterr().err


def test_config_without_the_flag_is_refused() -> None:
    with pytest.raises(ValueError, match="no effect without --kv-compression hardkv"):
        arguments.resolve_options("none", {"top_p": 0.7})


def test_defaults_fill_only_what_is_open() -> None:
    given = {"page_size": 64, "attention_backend": None, "max_running_requests": None}
    arguments.seed_defaults(given, device_is_cuda=True)
    seeded = {"attention_backend": "flashinfer", "max_running_requests": 256, "cuda_graph_max_bs_decode": 256}
    assert given == {"page_size": 64, **seeded}


def test_table_bounds() -> None:
    layout = PoolLayout(num_layers=2, num_kv_heads=2, head_dim=64, page_size=32, num_slots=320)
    capped = ResolvedConfig(HardKVConfig(max_tokens=1000), layout, 6, 0.125, 4, 8192)
    assert (capped.max_condensed_tokens, capped.max_condensed_pages, capped.group_size) == (1024, 32, 3)
    assert capped.max_sparse_span == 256 + 2 * 256
    lifted = ResolvedConfig(HardKVConfig(max_tokens=None), layout, 6, 0.125, 4, 8190)
    assert lifted.max_condensed_tokens == 8192
