"""Mixed load for a chosen time, then what must hold: `python -m bench.soak --minutes 10`."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.machine import environment
from bench.serving.models import layer_flags, prepare_model
from bench.soak import verdict
from bench.soak.client import Client, SoakError
from bench.soak.kinds import KINDS, NAMES, Kind
from bench.soak.load import Load
from bench.soak.readings import compression, fixed_answer, resident_bytes
from hardkv_sglang.cli.demo_model import DemoModelError
from hardkv_sglang.cli.server_process import Flags, ServerError, ServerProcess

ROOT = Path(__file__).parents[2]
PACKAGES = ("sglang", "torch", "triton", "flashinfer-python", "transformers", "hardkv-sglang")
SAMPLE_INTERVAL_S = 5.0
PATIENCE_S = 900.0
"""After the deadline, until a request without an answer counts as lost."""
STRICT = {"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1", "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1"}
OPTIONS = {
    "recent_tokens": 32, "query_window": 16, "select_interval": 32, "condense_interval": 64, "min_tokens": 8,
    "top_p": 0.8, "max_tokens": 128,
}  # fmt: skip
"""Short intervals: a few hundred tokens see several events. The cap frees pages with untrained weights, too."""
COMMON_FLAGS = {
    "page-size": 32, "max-running-requests": 16, "chunked-prefill-size": 128, "random-seed": 0, "enable-metrics": True,
    "enable-priority-scheduling": True, "kv-compression": "hardkv",
}  # fmt: skip
# a pool that is too small for what comes, so that relief and retraction take part
DEVICE_FLAGS: dict[str, Flags] = {
    "cpu": {"dtype": "float32", "max-total-tokens": 3072, "sleep-on-idle": True},
    "cuda": {
        "dtype": "bfloat16", "attention-backend": "flashinfer", "max-total-tokens": 16384, "max-running-requests": 64,
        "cuda-graph-max-bs-decode": 64, "mem-fraction-static": 0.7,
    },
}  # fmt: skip
CLIENTS = {"cpu": 10, "cuda": 64}
MAX_OUTPUT = {"cpu": 320, "cuda": 1200}
LAYERS = {"cpu": 8, "cuda": None}


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Command line; what follows `--` goes to the server."""
    words, flags = list(argv), []
    if "--" in words:
        cut = words.index("--")
        words, flags = words[:cut], words[cut + 1 :]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(
        prog="python -m bench.soak", description=__doc__, epilog="Flags of the server follow --"
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="of load (default: %(default)s)")
    parser.add_argument("--url", help="a running server instead of one that is started")
    parser.add_argument("--pid", type=int, help="its process, for the check of memory")
    parser.add_argument("--device", choices=DEVICE_FLAGS, default=device, help="flags and load (default: %(default)s)")
    parser.add_argument("--model", default="demo", help="demo, a shape of bench/serving/dummy_models.py, or a folder")
    parser.add_argument("--layers", type=int, help="run only the first layers (default: 8 on a CPU, else all)")
    parser.add_argument("--clients", type=int, help="requests at a time")
    parser.add_argument("--max-prompt", type=int, default=200, help="tokens (default: %(default)s)")
    parser.add_argument("--max-output", type=int, help="tokens")
    parser.add_argument("--without", choices=NAMES, action="append", default=[], help="leave a kind of request out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file of the result")
    parser.add_argument("--log", type=Path, help="log of the server that is started")
    args = parser.parse_args(words)
    args.server_flags = parse_flags(flags)
    args.clients = args.clients or CLIENTS[args.device]
    args.max_output = args.max_output or MAX_OUTPUT[args.device]
    args.layers = args.layers or LAYERS[args.device]
    return args


def parse_flags(words: Sequence[str]) -> dict[str, Any]:
    """`--name value` and bare `--name`, by name. Raises `ValueError`."""
    flags: dict[str, Any] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name, _, value = word.removeprefix("--").partition("=")
            flags[name] = value or True
        elif name and flags[name] is True:
            flags[name] = word
        else:
            raise ValueError(f"{word!r} belongs to no flag of the server")
    return flags


@contextmanager
def running_server(args: argparse.Namespace, scratch: Path) -> Any:
    """The server that is started, ready; ended with the block."""
    model, model_flags = prepare_model(args.model, scratch)
    flags = {**COMMON_FLAGS, **DEVICE_FLAGS[args.device], "kv-compression-config": json.dumps(OPTIONS)}
    flags |= {**model_flags, **layer_flags(args.layers), **args.server_flags}
    threads = {"OMP_NUM_THREADS": "1"} if args.device == "cpu" and "OMP_NUM_THREADS" not in os.environ else {}
    server = ServerProcess(model, flags, {**STRICT, **threads}, args.log or scratch / "server.log")
    try:
        server.wait_ready(timeout_s=1200.0)
        yield server
    finally:
        server.stop()


@dataclass
class Observation:
    """What was sampled during the load."""

    memory: list[int] = field(default_factory=list)  # bytes
    counters: list[dict[str, float]] = field(default_factory=list)


def find_kinds(client: Client, args: argparse.Namespace) -> list[Kind]:
    """The kinds that this server can answer at all, by its tokenizer: chats need a template."""
    kinds = [kind for kind in KINDS if kind.name not in args.without]
    body = {"model": "default", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
    has_template = client.post("/v1/chat/completions", body).status_code == 200
    return [kind for kind in kinds if has_template or kind.name != "chat"]


def watch(client: Client, load: Load, pid: int | None, server: ServerProcess | None) -> tuple[Observation, int]:
    """Run the load, showing how far it is. Returns what was sampled and how many requests got no answer."""
    seen, start, threads = Observation(), time.monotonic(), load.start()
    while any(thread.is_alive() for thread in threads):
        if server is not None:
            server.check_alive()
        if not load.is_over:
            if pid is not None:
                seen.memory.append(resident_bytes(pid))
            counters = compression(client)
            if counters is not None:
                seen.counters.append(counters)
        show(load, seen, time.monotonic() - start)
        if time.monotonic() > load.deadline + PATIENCE_S:
            break
        time.sleep(SAMPLE_INTERVAL_S)
    return seen, load.record.running


def show(load: Load, seen: Observation, seconds: float) -> None:
    """One line of progress."""
    record, events = load.record, seen.counters[-1] if seen.counters else {}
    memory = f", {seen.memory[-1] >> 20} MB" if seen.memory else ""
    print(
        f"{seconds:6.0f} s: {record.num_requests} requests, {record.running} running, {len(record.failures)} failures, "
        f"{events.get('select_events', 0):.0f} select and {events.get('condense_events', 0):.0f} condense events, "
        f"{events.get('early_events', 0):.0f} early{memory}",
        flush=True,
    )


def soak(args: argparse.Namespace, url: str, pid: int | None, server: ServerProcess | None) -> dict[str, Any]:
    """Load and checks; the result without the machine."""
    client = Client(url)
    kinds = find_kinds(client, args)
    before = fixed_answer(client, args.max_output)
    deadline = time.monotonic() + 60 * args.minutes
    load = Load(url, kinds, args.clients, args.max_prompt, args.max_output, args.seed, deadline)
    seen, waiting = watch(client, load, pid, server)
    checks = [verdict.check_requests(load.record, waiting), verdict.check_pages(client)]
    checks += verdict.check_counters(client, seen.counters)
    checks.append(verdict.check_fixed_answer(client, before))
    if seen.memory:
        checks.append(verdict.check_memory(seen.memory))
    if server is not None:
        server.check_idle()
        checks.append(verdict.Check("the server's own leak checks passed", True, STRICT))
    record = load.record
    return {
        "passed": all(check.holds for check in checks),
        "minutes": args.minutes, "clients": args.clients, "seed": args.seed, "max_output": args.max_output,
        "requests": record.num_requests,
        "ends": {f"{kind}: {end}": number for (kind, end), number in sorted(record.ends.items())},
        "left_out": [name for name in NAMES if name not in [kind.name for kind in kinds]],
        "operations": dict(record.operations),
        "failures": [asdict(failure) for failure in record.failures],
        "checks": [asdict(check) for check in checks],
        "memory_mb": [value >> 20 for value in seen.memory],
    }  # fmt: skip


def report(result: dict[str, Any], out: Path | None) -> None:
    """Print what matters, and write everything."""
    for check in result["checks"]:
        print(f"{'ok  ' if check['holds'] else 'FAIL'} {check['statement']} {json.dumps(check['seen'])[:600]}")
    word = "passed" if result["passed"] else "FAILED"
    print(f"{result['requests']} requests, {len(result['failures'])} failures: {word}")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 everything holds, 1 something does not, 2 there was no soak."""
    words = sys.argv[1:] if argv is None else argv
    command = shlex.join(["python", "-m", "bench.soak", *words])
    try:
        args = parse_arguments(words)
        with tempfile.TemporaryDirectory(prefix="hardkv-soak-") as scratch:
            if args.url:
                result = soak(args, args.url, args.pid, None)
                result["server"] = args.url
            else:
                with running_server(args, Path(scratch)) as server:
                    result = soak(args, server.url, server.pid, server)
                    result["server"] = server.command_text()
        report({"command": command, **environment(ROOT, PACKAGES), **result}, args.out)
    except (ValueError, DemoModelError, ServerError, SoakError) as error:
        print(f"bench.soak: {error}", file=sys.stderr)
        return 2
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
