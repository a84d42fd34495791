"""`hardkv top`: what a running server holds and what compression does, refreshed."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hardkv_sglang.cli.chart import sparkline

if TYPE_CHECKING:
    from hardkv_sglang.cli.snapshot import Snapshot

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

CLEAR = "\x1b[H\x1b[J"  # cursor home, erase to the end of the screen
LABEL_WIDTH = 13
HISTORY = 240  # values of the pool chart


def add_parser(subparsers: Subparsers) -> None:
    """Declare the subcommand."""
    text = "show what a running server holds and what compression does, refreshed"
    parser = subparsers.add_parser(
        "top",
        help=text,
        description=f"{text.capitalize()}. Reads /v1/loads, /server_info and, for retractions, /metrics.",
        epilog="Ctrl-C ends it. Exit status 2: the server cannot be reached, or does not compress.",
    )
    parser.add_argument("--url", required=True, help="server, for example http://127.0.0.1:30000")
    parser.add_argument("--api-key", metavar="KEY", help="the server's --api-key, if it has one")
    parser.add_argument(
        "--interval", type=positive, default=2.0, metavar="S", help="seconds between two looks (default: %(default)g)"
    )
    parser.add_argument("--once", action="store_true", help="look once and end")
    parser.add_argument("--json", action="store_true", help="print each look as one line of JSON")
    parser.set_defaults(run=run)


def positive(text: str) -> float:
    """A number above zero, for argparse."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds above 0")
    return value


def run(args: argparse.Namespace) -> int:
    """Exit status 0 when ended by Ctrl-C or `--once`, 2 when the server cannot be asked."""
    from hardkv_sglang.cli.snapshot import ServerView, SnapshotError

    view, pool = ServerView(args.url, args.api_key), deque[float](maxlen=HISTORY)
    try:
        while True:
            snapshot = view.read()
            pool.append(snapshot.used_tokens)
            show(args, view.url, snapshot, list(pool))
            if args.once:
                return 0
            time.sleep(args.interval)
    except KeyboardInterrupt:
        return 0
    except SnapshotError as error:
        print(f"hardkv top: {error}", file=sys.stderr)
        return 2


def show(args: argparse.Namespace, url: str, snapshot: Snapshot, pool: Sequence[float]) -> None:
    """One look: JSON, the screen anew, or lines below the last ones where there is no screen."""
    if args.json:
        print(json.dumps(snapshot.to_dict()), flush=True)
        return
    is_screen = sys.stdout.isatty() and not args.once
    lines = [f"{url}  {time.strftime('%H:%M:%S')}", *describe(snapshot)]
    if is_screen:
        width = shutil.get_terminal_size().columns - LABEL_WIDTH
        lines.append(line("pool so far", sparkline(pool, snapshot.pool_tokens, width)))
    print((CLEAR if is_screen else "") + "\n".join(lines), flush=True)


def describe(snapshot: Snapshot) -> list[str]:
    """The snapshot as lines of text."""
    s = snapshot
    retracted = "retractions unknown (server without --enable-metrics)"
    if s.retracted_requests is not None:
        retracted = f"{s.retracted_requests} requests retracted"
    return [
        line("requests", f"{s.running_requests} running, {s.waiting_requests} waiting"),
        line("decode", f"{s.tokens_per_second:.0f} tokens/s at the last log line"),
        line("pool", f"{s.used_tokens} of {s.pool_tokens} tokens, {percent(s.used_tokens, s.pool_tokens)}"),
        line("output", f"{s.output_pages} of {s.dense_output_pages} token pages, {100 * s.kept_ratio:.1f} % of dense"),
        line("kept", f"{100 * s.kept_fraction:.1f} % of the tokens that select events scored"),
        line("events", f"{s.select_events} select, {s.condense_events} condense; {s.early_events} early"),
        line("postponed", f"{s.postponed_events} attempts to condense that got no pages"),
        line("token pages", f"{s.freed_pages} freed, {s.allocated_pages} taken for survivors"),
        line("pressure", f"{retracted}; {s.retractions_avoided} steps that fitted only because of early events"),
    ]


def line(label: str, text: str) -> str:
    """A labelled line."""
    return f"{label:<{LABEL_WIDTH}}{text}"


def percent(part: float, whole: float) -> str:
    """Share of a whole, which may be nothing."""
    return f"{100 * part / whole:.1f} %" if whole else "-"
