"""`hardkv demo`: the whole path on the demo model, on this machine.

Starts a real server with the flag, runs two concurrent streaming chats that share a system prompt, and shows what
compression kept and what it gave back.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from hardkv_sglang.cli.server_process import ServerProcess

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

# shorter intervals than the defaults, so that a minute of a small model on a CPU shows several events
OPTIONS = {
    "recent_tokens": 32,
    "query_window": 16,
    "select_interval": 32,
    "condense_interval": 96,
    "min_tokens": 8,
    "request_reports": 8,
}
SYSTEM_PROMPT = (
    "You are a patient teacher. You explain things step by step, with many small examples, and you never stop "
    "early: after every explanation you add another example, another question and its full answer. "
) * 2
QUESTIONS = (
    "Explain how to plan a vegetable garden, month by month.",
    "Tell a long story about a lighthouse keeper who learns to read the weather.",
)
COLORS = ("cyan", "magenta")


def add_parser(subparsers: Subparsers) -> None:
    """Declare the subcommand."""
    text = "serve the demo model with compression, chat with it, and show what was kept and freed"
    parser = subparsers.add_parser("demo", help=text, description=text)
    parser.add_argument("--tokens", type=int, default=480, metavar="N", help="tokens per chat (default: %(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit status 0 after a complete demonstration, 2 when the server or the model cannot be had."""
    import torch
    from rich.console import Console

    from hardkv_sglang.cli.demo_model import DemoModelError, demo_model_path
    from hardkv_sglang.cli.server_process import ServerError, ServerProcess

    console = Console(highlight=False)
    try:
        model = demo_model_path()
        with tempfile.TemporaryDirectory(prefix="hardkv-demo-") as folder:
            flags = {
                "kv-compression": "hardkv",
                "kv-compression-config": json.dumps(OPTIONS),
                # attention kernels on a GPU want 16 bits, a CPU is twice as fast with 32
                "dtype": "bfloat16" if torch.cuda.is_available() else "float32",
                "max-total-tokens": 16384,
                "max-running-requests": 8,
                "enable-cache-report": True,
            }
            server = ServerProcess(model, flags, {}, Path(folder) / "server.log")
            try:
                wait_with_progress(console, server)
                demonstrate(console, server, args.tokens)
            finally:
                console.print("[dim]stopping the server[/]")
                server.stop()
    except (DemoModelError, ServerError) as error:
        print(f"hardkv demo: {error}", file=sys.stderr)
        return 2
    return 0


def wait_with_progress(console: Console, server: ServerProcess) -> None:
    """Show that time passes and what the server does meanwhile."""
    console.print(f"[bold]{server.command_text()}[/]")
    with console.status("starting SGLang") as status:
        server.wait_ready(lambda seconds, line: status.update(f"starting SGLang, {seconds:.0f} s  [dim]{line}[/]"))
    console.print(f"server ready at {server.url}")


def demonstrate(console: Console, server: ServerProcess, num_tokens: int) -> None:
    """Two concurrent chats, then the tables."""
    # one short chat first: it puts the system prompt into the radix cache, where the two others find it
    chat(server, "Say hello.", 8, lambda text: None)
    printer = InterleavedPrinter(console)
    with ThreadPoolExecutor(len(QUESTIONS)) as executor:
        futures = [
            executor.submit(chat, server, question, num_tokens, lambda text, i=i: printer.feed(i, text))
            for i, question in enumerate(QUESTIONS)
        ]
        replies = [future.result() for future in futures]
    printer.close()
    print_tables(console, server.server_info(), replies)


def chat(server: ServerProcess, question: str, num_tokens: int, on_text: Any) -> Any:
    """Stream one chat through the OpenAI SDK; returns the usage block."""
    messages: Any = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": question}]
    stream: Any = server.client().chat.completions.create(
        model="default",
        messages=messages,
        max_tokens=num_tokens,
        temperature=0.7,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    usage = None
    for chunk in stream:
        usage = chunk.usage or usage
        if chunk.choices and chunk.choices[0].delta.content:
            on_text(chunk.choices[0].delta.content)
    return usage


class InterleavedPrinter:
    """Prints concurrent streams line by line, each under its own name and colour."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.partial = [""] * len(QUESTIONS)
        self.lock = threading.Lock()

    def feed(self, index: int, text: str) -> None:
        """Take over a piece of text; complete lines and long ones are printed."""
        with self.lock:
            self.partial[index] += text
            while (cut := self._break(self.partial[index])) >= 0:
                self._print(index, self.partial[index][:cut])
                self.partial[index] = self.partial[index][cut:].lstrip("\n ")

    def close(self) -> None:
        """Print what is left of each stream."""
        for index, text in enumerate(self.partial):
            self._print(index, text)

    def _break(self, text: str) -> int:
        newline, width = text.find("\n"), max(20, self.console.width - 10)
        if 0 <= newline <= width:
            return newline
        return text.rfind(" ", 1, width) if len(text) > width else -1

    def _print(self, index: int, line: str) -> None:
        if line.strip():
            self.console.print(f"[{COLORS[index]}]chat {index + 1} │[/] ", end="")
            self.console.print(line.rstrip(), markup=False)


def print_tables(console: Console, info: dict[str, Any], usages: list[Any]) -> None:
    """What the chats held, and what the server did."""
    from rich.table import Table

    state = info["internal_states"][0]["hardkv"]
    reports = [r for r in state["requests"] if r["select_events"]][-len(QUESTIONS) :]
    page_bytes = state["page_bytes"]
    table = Table("", *(f"chat {i + 1}" for i in range(len(reports))), title="what compression did")
    rows: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("tokens of KV", lambda r: f"{r['num_tokens']}"),
        ("select / condense events", lambda r: f"{r['select_events']} / {r['condense_events']}"),
        ("kept tokens per head, mean", lambda r: f"{r['kept_mean']:.0f}"),
        (
            "kept tokens per head, p10 / p90 / max",
            lambda r: f"{r['kept_p10']:.0f} / {r['kept_p90']:.0f} / {r['kept_max']}",
        ),
        ("token pages, dense", lambda r: f"{r['dense_pages']}"),
        ("token pages, held", lambda r: f"{r['held_pages']}"),
        ("token pages, freed while running", lambda r: f"{r['dense_pages'] - r['held_pages']}"),
        ("KV, dense", lambda r: f"{r['dense_pages'] * page_bytes / 1e6:.1f} MB"),
        ("KV, held", lambda r: f"{r['held_pages'] * page_bytes / 1e6:.1f} MB"),
    ]
    for name, cell in rows:
        table.add_row(name, *(cell(report) for report in reports))
    console.print(table)
    dense, held = (sum(r[key] for r in reports) for key in ("dense_pages", "held_pages"))
    cached = [usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details else 0 for usage in usages]
    console.print(
        f"events: {state['select_events']} select, {state['condense_events']} condense, "
        f"{state['postponed_events']} postponed"
    )
    console.print(
        f"token pages returned to SGLang while requests ran: {state['freed_pages'] - state['allocated_pages']}"
    )
    console.print(f"KV held at the end: {held} of {dense} token pages, {100 * held / dense:.0f} % of dense")
    console.print(f"prompt tokens served from the shared prefix (radix cache): {cached}")
