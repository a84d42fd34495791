"""Run the serving benchmark: `python -m bench.serving --preset cpu|gpu|smoke`."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.machine import environment, read_commit
from bench.serving import systems as system_table
from bench.serving import workloads as workload_table
from bench.serving.cells import Cell, plan_cells
from bench.serving.client import ClientError
from bench.serving.models import layer_flags, prepare_model
from bench.serving.presets import PRESETS, Preset
from bench.serving.report import write_report
from bench.serving.runner import Runner, TimeLimitError
from hardkv_sglang.cli.demo_model import DemoModelError, cache_directory
from hardkv_sglang.cli.server_process import ServerError
from hardkv_sglang.config import HardKVConfig

ROOT = Path(__file__).parents[2]
PACKAGES = ("sglang", "torch", "triton", "flashinfer-python", "transformers", "hardkv-sglang")
PLAIN_WIDTH = 120
"""Columns of output that goes to a file."""
COMMON_FLAGS = {
    "random-seed": 0,
    # every chunk with all of the text so far makes the client the bottleneck of long outputs
    "incremental-streaming-output": True,
}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line of the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m bench.serving", description=__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="cpu", help="model, pool, workloads (default: cpu)")
    parser.add_argument("--workloads", type=names, default=[], metavar="A,B", help="only these (default: all)")
    parser.add_argument("--systems", type=names, default=[], metavar="A,B", help="only these (default: all)")
    parser.add_argument(
        "--clients", type=numbers, default=[], metavar="N,M", help="concurrency instead of the preset's"
    )
    parser.add_argument("--model", help="demo, a shape of dummy_models.py, or a folder")
    parser.add_argument("--layers", type=positive, metavar="N", help="run only the first N layers; the report says so")
    parser.add_argument("--pool-tokens", type=positive, metavar="N", help="pool; the number of clients follows it")
    parser.add_argument("--options", type=compression_options, metavar="JSON", help="compression options")
    parser.add_argument("--flags", type=server_flags, default={}, metavar="JSON", help="more flags of every server")
    parser.add_argument("--rounds", type=positive, metavar="N", help="repetitions, with the systems in alternation")
    parser.add_argument(
        "--time-limit", type=float, default=math.inf, metavar="S", help="stop after S seconds; resumable"
    )
    parser.add_argument("--report-only", action="store_true", help="report the results that are there")
    parser.add_argument("--work", type=Path, help="folder of resumable results and logs (default: in the cache)")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", help="folder of JSON and Markdown")
    parser.add_argument("--pictures", type=Path, default=ROOT / "docs" / "img", help="folder of pictures")
    return parser.parse_args(argv)


def names(text: str) -> list[str]:
    """Comma-separated names."""
    return [word.strip() for word in text.split(",") if word.strip()]


def numbers(text: str) -> list[int]:
    """Comma-separated numbers above 0."""
    return [positive(word) for word in names(text)]


def positive(text: str) -> int:
    """A number above 0."""
    if not text.strip().isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def json_object(text: str) -> dict[str, Any]:
    """A JSON object."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return value


def compression_options(text: str) -> dict[str, Any]:
    """Options as given, once they are known to be valid."""
    options = json_object(text)
    try:
        HardKVConfig.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return options


def server_flags(text: str) -> dict[str, Any]:
    """Flags by name, with or without their dashes; `true` is a flag without a value."""
    return {name.removeprefix("--"): value for name, value in json_object(text).items()}


def build_preset(args: argparse.Namespace) -> Preset:
    """The preset with what the command line changes. Raises `ValueError` for an unknown workload."""
    preset = PRESETS[args.preset]
    if args.pool_tokens is not None:
        preset = preset.with_pool(args.pool_tokens)
    changes: dict[str, Any] = {name: getattr(args, name) for name in ("model", "layers", "options", "rounds")}
    chosen = workload_table.select(preset.workloads, args.workloads)
    if args.clients:
        chosen = [workload.with_concurrency(args.clients) for workload in chosen]
    given = {name: value for name, value in changes.items() if value is not None}
    # where a preset gives a flag to all servers or to some, the command line replaces it for all
    flags, same_flags = {**preset.flags, **args.flags}, {**preset.same_flags, **args.flags}
    return replace(preset, workloads=tuple(chosen), flags=flags, same_flags=same_flags, **given)


def finished(groups: Sequence[Sequence[Cell]], folder: Path) -> list[tuple[Cell, dict[str, Any]]]:
    """Cells that have a result."""
    results = [(cell, cell.load(folder)) for group in groups for cell in group]
    return [(cell, result) for cell, result in results if result is not None]


def run_missing(console: Console, model: Path, groups: Sequence[Sequence[Cell]], folder: Path, args: Any) -> bool:
    """Run what has no result, showing how far it is; whether everything is finished."""
    total, done = sum(len(group) for group in groups), len(finished(groups, folder))
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("measurements", total=total, completed=done)

        def on_result(cell: Cell, result: dict[str, Any]) -> None:
            figures = result["figures"]
            console.print(
                f"{cell.title}: {figures['output_tokens_per_second']:.1f} tok/s, {figures['seconds']:.1f} s, "
                f"peak {figures['peak_tokens']} tokens, {figures['retractions']} retractions"
            )
            progress.advance(task)

        runner = Runner(
            model=model,
            folder=folder,
            commit=read_commit(ROOT),
            deadline=time.monotonic() + args.time_limit,
            warmup_tokens=PRESETS[args.preset].warmup_tokens,
            on_status=lambda text: progress.update(task, description=text[:110]),
            on_result=on_result,
        )
        try:
            runner.run(groups)
        except TimeLimitError:
            console.print(f"time limit of {args.time_limit:.0f} s reached; run the same command again to go on")
            return False
    return True


def execute(console: Console, args: argparse.Namespace, command: str, scratch: Path) -> bool:
    """Run what is missing, then write the report; whether everything is finished."""
    preset = build_preset(args)
    model, model_flags = prepare_model(preset.model, scratch)
    common = {**preset.flags, **COMMON_FLAGS, **model_flags, **layer_flags(preset.layers)}
    common["max-total-tokens"] = preset.pool_tokens
    table = system_table.build_systems(common, preset.same_flags, preset.options)
    systems = system_table.select(table, args.systems or preset.systems)
    groups = plan_cells(preset.model, systems, preset.workloads, preset.rounds)
    folder = args.work or cache_directory() / "serving-results" / preset.name
    folder.mkdir(parents=True, exist_ok=True)
    is_complete = args.report_only or run_missing(console, model, groups, folder, args)
    done = finished(groups, folder)
    if not done:
        console.print("nothing is finished yet, so there is no report")
        return False
    run = {"command": command, **environment(ROOT, PACKAGES)}
    write_report(console, preset, systems, done, run, (args.results, args.pictures))
    return is_complete


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 complete, 1 the time limit came first, 2 an error."""
    args = parse_arguments(argv)
    command = shlex.join(["python", "-m", "bench.serving", *(sys.argv[1:] if argv is None else argv)])
    try:
        with tempfile.TemporaryDirectory(prefix="hardkv-serving-") as scratch:
            console = Console(highlight=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH)
            return 0 if execute(console, args, command, Path(scratch)) else 1
    except (ValueError, DemoModelError, ServerError, ClientError) as error:
        print(f"bench.serving: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
