"""`hardkv demo`: the whole path on the demo model, on this machine.

Starts a real server with the flag, has it answer the same prompts twice, dense by opting out and compressed, and shows
both answers, the pool during both rounds, and what compression kept and gave back.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hardkv_sglang.cli.demo_view import DemoView
    from hardkv_sglang.cli.server_process import ServerProcess

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

# far below the defaults, so that answers of a few hundred tokens see several events
OPTIONS = {
    "recent_tokens": 64,
    "query_window": 32,
    "select_interval": 64,
    "condense_interval": 64,
    "min_tokens": 16,
    "request_reports": 8,  # /server_info lists finished requests, for the table
}
PAGE_SIZE = 16
PROMPTS = (
    "Explain how the water cycle works, step by step.",
    "Write a letter to a friend about a week in the mountains.",
    "Write a short story about a lighthouse keeper who learns to read the weather.",
)
ROUNDS = ("dense", "compressed")
LOOK_S = 0.5  # between two looks at the pool


@dataclass(frozen=True)
class Answer:
    """One answer of one round."""

    text: str
    num_tokens: int
    is_complete: bool  # the model ended it itself


def add_parser(subparsers: Subparsers) -> None:
    """Declare the subcommand."""
    text = "serve a small model with compression; show dense and compressed answers side by side, and what was freed"
    parser = subparsers.add_parser("demo", help=text, description=f"{text[0].upper()}{text[1:]}. Takes some minutes.")
    parser.add_argument(
        "--tokens", type=int, default=480, metavar="N", help="most tokens of an answer (default: %(default)s)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit status 0 after a complete demonstration, 2 when the server or the model cannot be had."""
    try:
        from openai import OpenAIError

        from hardkv_sglang.cli.demo_model import DemoModelError, demo_model_path
        from hardkv_sglang.cli.demo_view import DemoView
        from hardkv_sglang.cli.server_process import ServerError, ServerProcess
        from hardkv_sglang.cli.snapshot import SnapshotError
    except ImportError as error:
        print(f"hardkv demo: needs {error.name}; run: pip install 'hardkv-sglang[demo]'", file=sys.stderr)
        return 2

    view = DemoView()
    try:
        model = demo_model_path()
        with tempfile.TemporaryDirectory(prefix="hardkv-demo-") as folder:
            server = ServerProcess(model, server_flags(), {}, Path(folder) / "server.log")
            try:
                view.introduce(server, OPTIONS)
                demonstrate(view, server, args.tokens)
            finally:
                view.note("stopping the server")
                server.stop()
    except (DemoModelError, OpenAIError, ServerError, SnapshotError) as error:
        print(f"hardkv demo: {error}", file=sys.stderr)
        return 2
    return 0


def server_flags() -> dict[str, Any]:
    """Flags of the server, without the leading dashes."""
    import torch

    return {
        "kv-compression": "hardkv",
        "kv-compression-config": json.dumps(OPTIONS),
        # attention kernels on a GPU want 16 bits, a CPU is twice as fast with 32
        "dtype": "bfloat16" if torch.cuda.is_available() else "float32",
        "page-size": PAGE_SIZE,
        "max-total-tokens": 4096,
        "max-running-requests": 8,
    }


def demonstrate(view: DemoView, server: ServerProcess, num_tokens: int) -> None:
    """Both rounds, then the answers and the tables."""
    # a first request pays for what a server does once, so that both rounds take what they take
    ask(server, PROMPTS[0], "warm-up", ROUNDS[0], 4)
    answers = [play_round(view, server, name, num_tokens) for name in ROUNDS]
    for prompt, dense, compressed in zip(PROMPTS, *answers, strict=True):
        view.compare(prompt, dense, compressed)
    state = server.server_info()["internal_states"][0]["hardkv"]
    reports = {report["rid"]: report for report in state["requests"]}
    compressed_ids = [request_id(ROUNDS[1], i) for i in range(len(PROMPTS))]
    view.summarise(state, [reports[rid] for rid in compressed_ids if rid in reports])


def play_round(view: DemoView, server: ServerProcess, name: str, num_tokens: int) -> list[Answer]:
    """All prompts at once; the pool is watched until the last answer is there."""
    with ThreadPoolExecutor(len(PROMPTS)) as executor:
        running = []
        for index, prompt in enumerate(PROMPTS):
            running.append(executor.submit(ask, server, prompt, request_id(name, index), name, num_tokens))
        watch(view, server, name, running)
    return [future.result() for future in running]


def watch(view: DemoView, server: ServerProcess, name: str, running: Sequence[Future[Answer]]) -> None:
    """Show the pool twice a second while the round lasts."""
    from hardkv_sglang.cli.snapshot import ServerView

    eyes = ServerView(server.url)
    with view.watching(name) as show:
        while wait(running, timeout=LOOK_S).not_done:
            show(eyes.read())


def request_id(name: str, index: int) -> str:
    """Id of a prompt's request in a round."""
    return f"{name}-{index}"


def ask(server: ServerProcess, prompt: str, rid: str, name: str, num_tokens: int) -> Answer:
    """One answer through the OpenAI SDK, greedy: the same on every run. The penalty keeps so small a model from
    repeating itself, dense or not."""
    messages: Any = [{"role": "user", "content": prompt}]
    override = {"kv_compression": "none" if name == ROUNDS[0] else "hardkv"}
    reply = server.client().chat.completions.create(
        model="default",
        messages=messages,
        max_tokens=num_tokens,
        temperature=0,
        extra_body={"rid": rid, "repetition_penalty": 1.1, "custom_params": override},
    )
    choice, usage = reply.choices[0], reply.usage
    tokens = usage.completion_tokens if usage is not None else 0
    return Answer((choice.message.content or "").strip(), tokens, choice.finish_reason == "stop")
