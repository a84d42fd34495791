"""KL and agreement of what real servers generate under compression, against held bytes: `hardkv eval`, point by point.

    python -m bench.fidelity.texts --model FOLDER --prompts --out prompts.json
    python -m bench.fidelity.free_running --model FOLDER --prompts prompts.json --out results/MODEL.jsonl
    python -m bench.fidelity.frontier --report results/*.jsonl --results bench/results --name fidelity_free

Each point is a server of its own, which generates from all prompts at once and then scores its texts in its own dense
prefill. Points that the file has already are left out, so a run may be cut off at any time and goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.fidelity.frontier_points import Point, defaults, kept, observed_only, streaming, top_p, uniform
from hardkv_sglang.cli.main import main as hardkv
from hardkv_sglang.cli.server_process import ServerError, ServerProcess

TOKENS, FIRST = 4096, 1024
FLAGS: dict[str, Any] = {
    "skip-tokenizer-init": True, "page-size": 32, "max-running-requests": 32, "chunked-prefill-size": 2048,
    "random-seed": 0,
}  # fmt: skip
DEVICE_FLAGS: dict[str, dict[str, Any]] = {
    "cuda": {"dtype": "bfloat16", "attention-backend": "flashinfer", "cuda-graph-max-bs-decode": 32},
    "cpu": {"dtype": "float32"},
}


@dataclass(frozen=True)
class ServerPoint:
    """A server: stock with flags of its own, or compression with the options of a point."""

    family: str
    name: str
    flags: dict[str, Any] = field(default_factory=dict)
    held: float | None = None  # share of the bytes, where the server cannot tell

    @classmethod
    def of(cls, point: Point) -> ServerPoint:
        """Compression with a point's options."""
        flags = {"kv-compression": "hardkv", "kv-compression-config": json.dumps(point.options)}
        return cls(point.family, point.name, flags)


def server_points() -> list[ServerPoint]:
    """What is compared, most important first."""
    return [
        ServerPoint.of(kept(256, 0.1)),
        ServerPoint.of(top_p(256, 0.98)),
        ServerPoint.of(defaults()),
        ServerPoint.of(observed_only()),
        ServerPoint.of(streaming(512)),
        ServerPoint.of(uniform("rkv", 256, 256)),
        ServerPoint.of(top_p(256, 0.95)),
        ServerPoint.of(kept(256, 0.2)),
        ServerPoint.of(uniform("snapkv", 256, 256)),
        ServerPoint.of(kept(256, 0.1, 256, name="interval 256")),
        ServerPoint.of(streaming(256)),
        ServerPoint.of(kept(128, 0.05)),
        ServerPoint.of(top_p(256, 0.99)),
        ServerPoint.of(uniform("rkv", 128, 128)),
        ServerPoint.of(top_p(128, 0.95)),
        ServerPoint.of(streaming(1024)),
        ServerPoint("number formats", "stock e4m3", {"kv-cache-dtype": "fp8_e4m3"}, held=0.5),
        ServerPoint("stock", "stock", held=1.0),
        ServerPoint.of(kept(512, 0.05)),
        ServerPoint.of(kept(256, 0.3)),
    ]


def measure(point: ServerPoint, args: argparse.Namespace) -> None:
    """Start the server, evaluate it, append one line per prompt. Says so when the server fails."""
    entries, started = json.loads(args.prompts.read_text()), time.monotonic()
    stem = args.out.with_name(f"{args.out.stem}.{point.name.replace(' ', '_').replace('/', '_')}")
    prompts, report, texts = (stem.with_name(f"{stem.name}.{name}.json") for name in ("prompts", "eval", "texts"))
    prompts.write_text(json.dumps([entry["tokens"] for entry in entries]))
    flags = {**FLAGS, **DEVICE_FLAGS[args.device], "max-total-tokens": args.pool_tokens, **point.flags}
    server = ServerProcess(args.model, flags, {}, stem.with_name(f"{stem.name}.log"))
    try:
        server.wait_ready(timeout_s=1200.0)
        command = ["eval", "--url", server.url, "--prompts", str(prompts), "--tokens", str(args.tokens)]
        command += ["--first", str(args.first), "--concurrency", str(len(entries)), "--out", str(report)]
        command += ["--texts", str(texts)]
        if hardkv(command) == 0:
            names = [entry["name"] for entry in entries]
            named = zip(names, json.loads(texts.read_text()), strict=True)
            texts.write_text(json.dumps([{"name": name, **text} for name, text in named]))
            lines = lines_of(point, names, json.loads(report.read_text()))
            seconds = round(time.monotonic() - started, 1)
            with args.out.open("a") as file:
                file.writelines(json.dumps(line | {"seconds": seconds}) + "\n" for line in lines)
    except ServerError as error:
        print(f"{point.name}: {error}", file=sys.stderr)
    finally:
        server.stop()


def lines_of(point: ServerPoint, names: Sequence[str], report: dict[str, Any]) -> list[dict[str, Any]]:
    """One result per prompt, as of bench.fidelity.frontier; what is held is known for all of them together."""
    looks = report["held_over_time"]
    end = looks[-1]["output_pages"] / looks[-1]["dense_output_pages"] if looks else point.held
    held = {"held": report["held"] if looks else point.held, "held_end": end}
    shared = {"point": point.name, "family": point.family, **held, "kl_by_position": report["kl_by_position"]}
    scores = zip(names, report["prompts"], strict=True)
    return [{**shared, "text": name, "kl": score["kl"], "agreement": score["agreement"]} for name, score in scores]


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.fidelity.free_running", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="of bench.fidelity.texts --prompts")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="results, logs beside it")
    parser.add_argument("--device", choices=DEVICE_FLAGS, default="cuda", help="default: cuda")
    parser.add_argument("--tokens", type=int, default=TOKENS, metavar="N", help="of each output (default: %(default)s)")
    parser.add_argument("--first", type=int, default=FIRST, metavar="N", help="that counts (default: %(default)s)")
    parser.add_argument("--pool-tokens", type=int, default=163840, metavar="N", help="default: %(default)s")
    parser.add_argument("--servers", type=int, default=1, metavar="N", help="at a time (default: 1)")
    parser.add_argument("--points", metavar="PART", help="only points whose name contains this")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the points that are missing."""
    args = parse_arguments(argv)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    lines = args.out.read_text().splitlines() if args.out.exists() else []
    done = {json.loads(line)["point"] for line in lines}
    points = [point for point in server_points() if point.name not in done and (args.points or "") in point.name]
    with ThreadPoolExecutor(args.servers) as threads:
        list(threads.map(lambda point: measure(point, args), points))
    return 0


if __name__ == "__main__":
    sys.exit(main())
