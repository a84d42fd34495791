"""Decode speed on a GPU: stock SGLang, the flag without events, and a compressed long generation, in one run.

    python -m bench.serving.decode_speed --model qwen3-8b --json OUT.json

Dummy weights: attention is nearly uniform, so Top-p keeps everything and the cap decides what is kept. The
compressed requests really generate their tokens. Rates are SGLang's own decode log, median over log lines in
which all requests run.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import re
import statistics
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from bench.serving.dummy_models import SHAPES, write_model
from hardkv_sglang.server_process import ServerProcess

DENSE_CASES = ((64, 1024, 200), (32, 16384, 120))  # requests, prompt tokens, generated tokens
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


def generate(server: ServerProcess, prompts: list[list[int]], num_tokens: int) -> list[tuple[int, float]]:
    """Run all prompts at once; returns (pool tokens, tokens per second) of the log lines with all of them running."""
    before = len(server.log_text())
    sampling = {"temperature": 0, "max_new_tokens": num_tokens, "ignore_eos": True}
    with ThreadPoolExecutor(len(prompts)) as executor:
        list(executor.map(lambda ids: server.generate(input_ids=ids, sampling_params=sampling), prompts))
    lines = LOG_LINE.findall(server.log_text()[before:])
    # the first full line still contains prefill
    return [(int(tokens), float(rate)) for running, tokens, rate in lines if int(running) == len(prompts)][1:]


def measure_dense(server: ServerProcess) -> dict[str, float]:
    """Decode tokens per second of each dense case."""
    results = {}
    for batch, prompt_len, num_tokens in DENSE_CASES:
        lines = generate(server, [prompt(prompt_len, 1000 * batch + i) for i in range(batch)], num_tokens)
        results[f"{batch}x{prompt_len}"] = statistics.median(rate for _, rate in lines)
        server.flush_cache()
    return results


def measure_compressed(server: ServerProcess, num_tokens: int) -> dict[str, Any]:
    """32 requests from 512 tokens to `num_tokens` more; speed over the last eighth."""
    lines = generate(server, [prompt(512, i) for i in range(32)], num_tokens)
    tail = lines[-len(lines) // 8 :]
    state = server.server_info()["internal_states"][0]["hardkv"]
    return {
        "tokens_per_second": statistics.median(rate for _, rate in tail),
        "mean_tokens_per_second": len(tail) / sum(1 / rate for _, rate in tail),
        "pool_tokens": tail[-1][0],
        "dense_tokens": 32 * (512 + num_tokens),
        "table_bytes": state["table_bytes"],
        "select_events": state["select_events"],
        "condense_events": state["condense_events"],
    }


def run(shape: str, num_tokens: int, max_tokens: int, folder: Path) -> dict[str, Any]:
    """All measurements, one server after the other."""
    model = write_model(SHAPES[shape], folder / shape)
    variants: list[tuple[str, dict[str, Any] | None]] = [
        ("stock", None),
        ("no events", {"recent_tokens": 65536}),
        ("compressed", {"max_tokens": max_tokens}),
    ]
    results: dict[str, Any] = {}
    for name, options in variants:
        ours = {} if options is None else {"kv-compression": "hardkv", "kv-compression-config": json.dumps(options)}
        print(f"starting: {name}", flush=True)
        server = ServerProcess(model, {**FLAGS, **ours}, {}, folder / f"{name.replace(' ', '-')}.log")
        try:
            server.wait_ready()
            generate(server, [prompt(64, i) for i in range(8)], 16)  # warm-up
            is_long = name == "compressed"
            results[name] = measure_compressed(server, num_tokens) if is_long else measure_dense(server)
        finally:
            server.stop()
        print(f"{name}: {results[name]}", flush=True)
    return results


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="qwen3-8b")
    parser.add_argument("--tokens", type=int, default=16000, help="generated tokens of the compressed requests")
    parser.add_argument("--max-tokens", type=int, default=2048, help="cap per KV head")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = run(args.model, args.tokens, args.max_tokens, Path(folder))
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    environment = {
        "commit": commit,
        "gpu": torch.cuda.get_device_name(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("sglang", "torch", "triton", "flashinfer-python")},
    }
    args.json.write_text(json.dumps({"model": args.model, "environment": environment, "results": results}, indent=2))


if __name__ == "__main__":
    main()
