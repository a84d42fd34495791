"""The serving benchmark: what it reads from logs, what it asks for, and how it reports."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bench.machine import environment, read_commit
from bench.serving.__main__ import build_preset, main, parse_arguments
from bench.serving.cells import Cell, plan_cells
from bench.serving.dummy_models import write_tokenizer
from bench.serving.models import prepare_model
from bench.serving.monitor import parse_samples, summarise_counters, summarise_log
from bench.serving.presets import CPU, GPU, PRESETS, SMOKE
from bench.serving.report import write_report
from bench.serving.summary import Finished, summarise
from bench.serving.systems import NAMES, build_systems
from bench.serving.workloads import RandomPrompts, SharedPrefix, Workload

# of a stock server whose pool of 2560 tokens was too small
FULL_POOL_LOG = """\
[2026-11-25 07:43:29] Prefill batch, #new-seq: 1, #new-token: 32, #cached-token: 0, token usage: 0.15, \
#running-req: 5, #queue-req: 2, #pending-token: 0, cpu graph: False, input throughput (token/s): 55.23
[2026-11-25 07:43:37] Decode batch, #running-req: 6, #token: 2304, token usage: 0.90, cpu graph: False, \
gen throughput (token/s): 62.94, #queue-req: 2
[2026-11-25 07:43:40] Decode batch, #running-req: 6, #token: 2496, token usage: 0.97, cpu graph: False, \
gen throughput (token/s): 62.23, #queue-req: 2
[2026-11-25 07:43:42] KV cache pool is full. Retract requests. #retracted_reqs: 1, #new_tokens_gained: 384, \
#new_token_ratio: 0.3227 -> 0.8996
[2026-11-25 07:43:44] Decode batch, #running-req: 5, #token: 2240, token usage: 0.88, cpu graph: False, \
gen throughput (token/s): 58.57, #queue-req: 3
[2026-11-25 07:43:48] Decode batch, #running-req: 5, #token: 0, token usage: 0.00, cpu graph: False, \
gen throughput (token/s): 57.83, #queue-req: 3
[2026-11-25 07:43:48] INFO:     127.0.0.1:54712 - "POST /generate HTTP/1.1" 200 OK
"""
LONG = Workload("long", "fixed", RandomPrompts(32, 320), (2, 8), waves=1)
SHARED = Workload("shared-prefix", "groups", SharedPrefix(4, 128, 16, 16), (6,), waves=3)


def test_samples_of_a_log() -> None:
    samples = parse_samples(FULL_POOL_LOG)
    assert [sample.running for sample in samples] == [6, 6, 5, 5]
    assert [sample.tokens for sample in samples] == [2304, 2496, 2240, 0]
    assert [sample.queued for sample in samples] == [2, 2, 3, 3]
    assert samples[0].rate == 62.94
    assert [sample.seconds - samples[0].seconds for sample in samples] == [0, 3, 7, 11]


def test_lines_of_one_second_are_spread_over_it() -> None:
    line = FULL_POOL_LOG.splitlines()[1] + "\n"
    samples = parse_samples(line * 4)
    assert [sample.seconds - samples[0].seconds for sample in samples] == [0, 0.25, 0.5, 0.75]


def test_summary_of_a_log() -> None:
    assert summarise_log(FULL_POOL_LOG) == {
        "running_mean": 5.5,
        "running_max": 6,
        "peak_tokens": 2496,
        "retractions": 1,
    }
    empty = summarise_log("no decode line")
    assert empty == {"running_mean": None, "running_max": None, "peak_tokens": None, "retractions": 0}


def test_counters_are_differences() -> None:
    before = {
        "select_events": 3,
        "condense_events": 1,
        "postponed_events": 0,
        "candidate_tokens": 100,
        "kept_tokens": 90,
    }
    after = {
        "select_events": 7,
        "condense_events": 2,
        "postponed_events": 1,
        "candidate_tokens": 300,
        "kept_tokens": 140,
    }
    expected = {"select_events": 4, "condense_events": 1, "postponed_events": 1, "kept_fraction": 0.25}
    assert summarise_counters(before, after) == expected
    assert summarise_counters(before, before)["kept_fraction"] is None
    assert set(summarise_counters(None, None).values()) == {None}


def test_requests_of_a_workload() -> None:
    assert LONG.num_requests(8) == 8
    assert "--num-prompts=8" in LONG.arguments(8) and "--max-concurrency=8" in LONG.arguments(8)
    # whole groups only
    assert SHARED.num_requests(6) == 16
    assert "--gsp-prompts-per-group=4" in SHARED.arguments(6)


def test_clients_follow_the_pool() -> None:
    assert LONG.scaled(0.25).concurrency == (1, 2)  # from (0.5, 2), and one client at least
    assert LONG.scaled(2).concurrency == (4, 16)
    assert SHARED.scaled(0.1).concurrency == (4,)
    assert GPU.with_pool(GPU.pool_tokens // 2).workloads[0].concurrency == (4, 8, 16)


def test_long_workloads_overflow_the_pool() -> None:
    for preset in PRESETS.values():
        for workload in preset.workloads:
            data = workload.dataset
            if isinstance(data, RandomPrompts) and workload.name.startswith("long"):
                assert max(workload.concurrency) * (data.prompt_len + data.output_len) >= 1.9 * preset.pool_tokens


@pytest.mark.slow
def test_the_client_knows_every_argument() -> None:
    # SGLang's parser, in a process of its own because it imports all of SGLang
    words = [w for preset in (CPU, GPU) for load in preset.workloads for w in load.arguments(load.concurrency[0])]
    code = "from sglang.benchmark.serving import cli_main; cli_main()"
    command = [sys.executable, "-c", code, *words, "--help"]
    flags = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    for word in words:
        assert word.partition("=")[0] in flags


def test_command_line_changes_the_preset() -> None:
    options = '{"top_p": 0.9}'
    words = ["--preset", "cpu", "--workloads", "long", "--clients", "4,16", "--layers", "6", "--options", options]
    preset = build_preset(parse_arguments(words))
    assert [workload.concurrency for workload in preset.workloads] == [(4, 16)]
    assert (preset.layers, preset.options, preset.pool_tokens) == (6, {"top_p": 0.9}, 6144)


def test_flags_of_the_command_line_reach_every_server() -> None:
    flags = '{"--max-running-requests": 8, "enable-metrics": true}'
    preset = build_preset(parse_arguments(["--flags", flags]))
    for system in build_systems(preset.flags, preset.same_flags, {}):
        assert (system.flags["max-running-requests"], system.flags["enable-metrics"]) == (8, True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--workloads", "longest"], "no workload longest; this preset has: long, shared-prefix, chat, mixed"),
        (["--systems", "vanilla"], "no system vanilla; there are: stock, stock-same-flags, hardkv"),
        (["--model", "qwen9"], "--model qwen9: neither a model folder nor one of: demo, qwen3-8b"),
    ],
    ids=["workload", "system", "model"],
)
def test_bad_input_is_named(words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--report-only", "--work", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--options", "[1]"], "'[1]' is not a JSON object"),
        (["--flags", "page-size=1"], "'page-size=1' is not JSON"),
        (["--options", '{"top_q": 1}'], "unknown option 'top_q'"),
        (["--options", '{"top_p": 3}'], "top_p=3 is out of range"),
        (["--clients", "4,0"], "'0' is not a whole number above 0"),
        (["--rounds", "two"], "'two' is not a whole number above 0"),
    ],
    ids=["no-object", "no-json", "unknown-option", "range", "zero", "word"],
)
def test_bad_arguments_are_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(words)
    assert message in capsys.readouterr().err


def test_rounds_alternate() -> None:
    groups = plan_cells("demo", build_systems({}, {}, {}), [LONG], rounds=2)
    order = [group[0].system.name for group in groups]
    assert order == ["stock", "stock-same-flags", "hardkv", "stock-same-flags", "hardkv", "stock"]
    assert [cell.clients for cell in groups[0]] == [2, 8]


def test_systems_share_the_pool_and_the_flags() -> None:
    stock, same, ours = build_systems({"max-total-tokens": 6144}, {"page-size": 32}, {"top_p": 0.9})
    assert stock.flags == {"max-total-tokens": 6144}
    assert same.flags == {"max-total-tokens": 6144, "page-size": 32}
    assert ours.flags.items() >= same.flags.items()
    assert json.loads(ours.flags["kv-compression-config"]) == {"top_p": 0.9}


def test_a_result_counts_for_its_own_flags_only(tmp_path: Path) -> None:
    system, other = (build_systems({"max-total-tokens": n}, {}, {})[0] for n in (1280, 2560))
    cell = Cell("demo", system, LONG, 8, 0)
    assert cell.load(tmp_path) is None
    cell.save(tmp_path, {"figures": {}})
    loaded = cell.load(tmp_path)
    assert loaded is not None and loaded["figures"] == {}
    assert Cell("demo", other, LONG, 8, 0).load(tmp_path) is None
    assert Cell("qwen3-8b", system, LONG, 8, 0).load(tmp_path) is None


def result_of(seconds: float, **figures: float | None) -> dict[str, Any]:
    """Result of a measurement that took this long."""
    times = dict.fromkeys(("ttft_p50_ms", "ttft_p99_ms", "tpot_p50_ms", "tpot_p99_ms"), 100.0)
    rates = {"seconds": seconds, "output_tokens_per_second": 2560 / seconds, "requests_per_second": 8 / seconds}
    events = dict.fromkeys(("select_events", "condense_events", "postponed_events", "kept_fraction"))
    samples = [vars(sample) for sample in parse_samples(FULL_POOL_LOG)]
    figures = {"load_average": 2.0, **times, **rates, **summarise_log(FULL_POOL_LOG), **events, **figures}
    return {"commit": "c0ffee", "resolved": {"page_size": 32}, "figures": figures, "samples": samples}


def finished_rounds(seconds: dict[str, Sequence[float]]) -> list[Finished]:
    """Results of the long workload with 8 clients: the seconds of each round of each system."""
    systems = {system.name: system for system in build_systems({"max-total-tokens": 1280}, {}, {})}
    return [
        (Cell("demo", systems[name], LONG, 8, number), result_of(value))
        for name, values in seconds.items()
        for number, value in enumerate(values)
    ]


def test_rows_are_medians_with_ratios_against_stock() -> None:
    stock, ours = summarise(finished_rounds({"hardkv": [5, 8, 4], "stock": [10, 10, 40]}))
    assert (stock["system"], ours["system"], ours["baseline"]) == ("stock", "hardkv", "stock")
    assert ours["figures"]["seconds"] == 5 and ours["rounds"] == 3
    assert ours["seconds_ratio"] == 0.5 and ours["throughput_ratio"] == 2.0
    assert ours["throughput_range"] == [320, 640]
    assert stock["throughput_ratio"] == 1.0 and stock["figures"]["kept_fraction"] is None


def test_without_stock_the_same_flags_are_the_baseline() -> None:
    rows = summarise(finished_rounds({"stock-same-flags": [10], "hardkv": [5]}))
    assert [row["baseline"] for row in rows] == ["stock-same-flags"] * 2


def test_report_files(tmp_path: Path) -> None:
    finished = finished_rounds({"stock": [10], "hardkv": [5]})
    systems = list({cell.system.name: cell.system for cell, _ in finished}.values())
    console = Console(file=(tmp_path / "terminal").open("w"), width=200)
    write_report(console, SMOKE, systems, finished, {"command": "python"}, (tmp_path, tmp_path / "img"))
    report = json.loads((tmp_path / "serving_smoke.json").read_text())
    assert report["run"]["pool_tokens"] == SMOKE.pool_tokens and report["run"]["measured_commits"] == ["c0ffee"]
    assert report["run"]["layers"] == SMOKE.layers
    assert [row["system"] for row in report["rows"]] == ["stock", "hardkv"]
    text = (tmp_path / "serving_smoke.md").read_text()
    assert "| long | 8 | 8 | hardkv | 5.0 | 512.0 | 2.00x | 1.600 |" in text
    assert "against stock on" in text and "--num-prompts=8" in text
    assert {path.name for path in (tmp_path / "img").iterdir()} == {
        "serving_smoke_throughput.png",
        "serving_smoke_time.png",
    }


def test_dummy_tokenizer_is_exact(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    write_tokenizer(3000, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = list(range(2999, 0, -7))
    assert len(tokenizer) == 3000
    assert tokenizer.encode(tokenizer.decode(ids)) == ids


def test_dummy_model_has_a_tokenizer(tmp_path: Path) -> None:
    folder, flags = prepare_model("qwen3-tiny", tmp_path)
    assert flags == {"load-format": "dummy"}
    assert {"config.json", "tokenizer.json"} <= {path.name for path in folder.iterdir()}


def test_machine_is_described(tmp_path: Path) -> None:
    assert read_commit(tmp_path) == "unknown"
    described = environment(tmp_path, ["torch", "no-such-package"])
    assert "torch" in described and "no-such-package" not in described
    assert described["machine"]


def test_order_of_names_is_that_of_the_systems() -> None:
    assert tuple(system.name for system in build_systems({}, {}, {})) == NAMES
