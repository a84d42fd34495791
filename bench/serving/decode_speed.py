"""Decode speed on a GPU: stock SGLang, the flag without events, and a compressed long generation, in one run.

    python -m bench.serving.decode_speed --model qwen3-8b --json OUT.json

Dummy weights: attention is nearly uniform, so Top-p keeps everything and the cap decides what is kept. The
compressed requests really generate their tokens. Rates are SGLang's own decode log, median over log lines in
which all requests run. A trace of some steps near the end of each case says where their time goes.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.machine import environment
from bench.serving.dummy_models import SHAPES, write_model
from bench.serving.step_trace import StepTrace, profile_steps
from hardkv_sglang.cli.server_process import ServerProcess

ROOT = Path(__file__).parents[2]
PACKAGES = ("sglang", "torch", "triton", "flashinfer-python", "hardkv-sglang")
NAMES = ("stock", "no events", "compressed")

DENSE_CASES = [(64, 1024, 200), (32, 16384, 120)]  # requests, prompt tokens, generated tokens
DENSE_TRACED_STEPS = 60
COMPRESSED_TRACED_STEPS = 520
"""A whole interval of the default options: requests that started together have all of their events within it."""
LOG_LINE = re.compile(r"Decode batch, #running-req: (\d+), #token: (\d+).*?gen throughput \(token/s\): ([\d.]+)")
FLAGS: dict[str, Any] = {
    "load-format": "dummy",
    "skip-tokenizer-init": True,
    "dtype": "bfloat16",
    "attention-backend": "flashinfer",
    "page-size": 32,
    "random-seed": 0,
    "context-length": 40960,
    "max-running-requests": 256,
    "mem-fraction-static": 0.85,
    "decode-log-interval": 20,
    "cuda-graph-max-bs-decode": 128,
}


def prompt(num_tokens: int, seed: int) -> list[int]:
    """Random token ids."""
    rng = random.Random(seed)
    return [rng.randrange(10, 31000) for _ in range(num_tokens)]


def full_lines(server: ServerProcess, since: int, batch: int) -> list[tuple[int, float]]:
    """(pool tokens, tokens per second) of the log lines with all requests running, after position `since`."""
    lines = LOG_LINE.findall(server.log_text()[since:])
    return [(int(tokens), float(rate)) for running, tokens, rate in lines if int(running) == batch]


def generate(server: ServerProcess, prompts: list[list[int]], num_tokens: int) -> list[tuple[int, float]]:
    """Run all prompts at once; returns `full_lines`, less the first, which still contains prefill."""
    before = len(server.log_text())
    sampling = {"temperature": 0, "max_new_tokens": num_tokens, "ignore_eos": True}
    with ThreadPoolExecutor(len(prompts)) as executor:
        list(executor.map(lambda ids: server.generate(input_ids=ids, sampling_params=sampling), prompts))
    return full_lines(server, before, len(prompts))[1:]


def generate_traced(
    server: ServerProcess, prompts: list[list[int]], num_tokens: int, traced_steps: int, folder: Path
) -> tuple[list[tuple[int, float]], StepTrace]:
    """`generate`, with a trace of steps behind those whose log lines are returned."""
    # the profiler starts some steps after it is asked to
    before, traced_tokens = len(server.log_text()), num_tokens + traced_steps + 240
    with ThreadPoolExecutor(1) as executor:
        future = executor.submit(generate, server, prompts, traced_tokens)
        while (len(full_lines(server, before, len(prompts))) + 1) * FLAGS["decode-log-interval"] < num_tokens:
            if future.done():
                raise RuntimeError(f"the requests ended without {num_tokens} steps of all of them: {future.result()}")
            time.sleep(0.05)
        lines = full_lines(server, before, len(prompts))[1:]
        trace = profile_steps(server, traced_steps, folder)
        future.result()
    return lines, trace


def measure_dense(server: ServerProcess, cases: list[tuple[int, int, int]], folder: Path) -> dict[str, Any]:
    """Decode tokens per second and a trace of each dense case."""
    results = {}
    for batch, prompt_len, num_tokens in cases:
        prompts = [prompt(prompt_len, 1000 * batch + i) for i in range(batch)]
        lines, trace = generate_traced(server, prompts, num_tokens, DENSE_TRACED_STEPS, folder)
        speed = statistics.median(rate for _, rate in lines)
        results[f"{batch}x{prompt_len}"] = {"tokens_per_second": speed, "trace": trace.per_step()}
        server.flush_cache()
    return results


def measure_compressed(server: ServerProcess, batch: int, num_tokens: int, folder: Path) -> dict[str, Any]:
    """Requests from 512 tokens to `num_tokens` more; speed over the last eighth."""
    prompts = [prompt(512, i) for i in range(batch)]
    lines, trace = generate_traced(server, prompts, num_tokens, COMPRESSED_TRACED_STEPS, folder)
    tail = lines[-len(lines) // 8 :]
    state = server.server_info()["internal_states"][0]["hardkv"]
    return {
        "tokens_per_second": statistics.median(rate for _, rate in tail),
        "mean_tokens_per_second": len(tail) / sum(1 / rate for _, rate in tail),
        "slowest_tokens_per_second": min(rate for _, rate in tail),
        "pool_tokens": tail[-1][0],
        "requests": batch,
        "dense_tokens": batch * (512 + num_tokens),
        "table_bytes": state["table_bytes"],
        "select_events": state["select_events"],
        "condense_events": state["condense_events"],
        "event_seconds": state["event_seconds"],
        "trace": trace.per_step(),
    }


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All measurements, one server after the other."""
    model = write_model(SHAPES[args.model], folder / args.model)
    variants: list[tuple[str, dict[str, Any] | None]] = [
        ("stock", None),
        ("no events", {"recent_tokens": 65536}),
        ("compressed", {"max_tokens": args.max_tokens, **args.options}),
    ]
    results: dict[str, Any] = {}
    for name, options in variants:
        if name not in args.only:
            continue
        ours = {} if options is None else {"kv-compression": "hardkv", "kv-compression-config": json.dumps(options)}
        print(f"starting: {name}", flush=True)
        log = args.json.parent / f"{name.replace(' ', '-')}.log"
        server = ServerProcess(model, {**FLAGS, **ours}, {}, log)
        try:
            server.wait_ready()
            generate(server, [prompt(64, i) for i in range(8)], 16)  # warm-up
            if name == "compressed":
                results[name] = measure_compressed(server, args.batch, args.tokens, folder / name)
            else:
                results[name] = measure_dense(server, args.cases, folder / name)
        finally:
            server.stop()
        print(f"{name}: {results[name]}", flush=True)
    return results


def case(text: str) -> tuple[int, int, int]:
    """`requests x prompt tokens x generated tokens`."""
    batch, prompt_len, num_tokens = (int(word) for word in text.split("x"))
    return batch, prompt_len, num_tokens


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="qwen3-8b")
    parser.add_argument("--only", choices=NAMES, nargs="+", default=NAMES, help="only these servers")
    parser.add_argument("--cases", type=case, nargs="+", default=DENSE_CASES, metavar="BxPxT", help="of dense servers")
    parser.add_argument("--batch", type=int, default=32, help="compressed requests")
    parser.add_argument("--tokens", type=int, default=16000, help="generated tokens of the compressed requests")
    parser.add_argument("--max-tokens", type=int, default=2048, help="cap per KV head")
    parser.add_argument(
        "--options", type=json.loads, default={}, metavar="JSON", help="of compression, besides the cap"
    )
    parser.add_argument("--json", type=Path, required=True, help="figures; the servers' logs go beside it")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = run(args, Path(folder))
    report = {
        "model": args.model,
        "options": args.options,
        "environment": environment(ROOT, PACKAGES),
        "results": results,
    }
    args.json.write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
