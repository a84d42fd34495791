"""What the demo shows: panels and a live chart on a terminal, plain lines elsewhere."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from hardkv_sglang.cli.chart import sparkline

if TYPE_CHECKING:
    from hardkv_sglang.cli.demo import Answer
    from hardkv_sglang.cli.server_process import ServerProcess
    from hardkv_sglang.cli.snapshot import Snapshot

ABOUT = """\
The model is SmolLM2-135M-Instruct with 4-bit weights: small enough for any CPU, and wrong about many things by itself.
Compare the two columns with each other, not with the truth. The options are small for the demo, so that answers of a
few hundred tokens are compressed several times; with the defaults nothing happens before some 600 tokens of output."""
QUIET_S = 5.0  # between two lines about the pool, where there is no terminal
COLORS = {"dense": "yellow", "compressed": "cyan"}
CHART_LABEL = 30  # columns before a chart


class DemoView:
    """Keeps what the pool held in each round, so that both charts have one scale."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self.pool: dict[str, list[float]] = {}  # used tokens by round, look after look

    def note(self, text: str) -> None:
        """A line of little weight."""
        self.console.print(Text(text, style="dim"))

    def introduce(self, server: ServerProcess, options: Mapping[str, Any]) -> None:
        """What runs and why so, then wait for the server."""
        self.console.print(ABOUT, markup=False)
        self.console.print(f"options: {json.dumps(options)}", markup=False)
        self.console.print(Text(server.command_text(), style="bold"))
        with self.console.status("starting SGLang") as status:
            server.wait_ready(
                lambda seconds, line: status.update(f"starting SGLang, {seconds:.0f} s  [dim]{escape(line[:200])}[/]")
            )
        self.console.print(f"server ready at {server.url}")

    @contextmanager
    def watching(self, name: str) -> Iterator[Callable[[Snapshot], None]]:
        """Within the block, each snapshot goes to the chart of this round."""
        history = self.pool.setdefault(name, [])
        if self.console.is_terminal:
            with Live(console=self.console, transient=True) as live:
                yield lambda snapshot: self._refresh(live, history, snapshot)
        else:
            yield self._plain_lines(name, history)
        self.console.print(Text(self._chart(name), style=COLORS[name]))

    def _refresh(self, live: Live, history: list[float], snapshot: Snapshot) -> None:
        history.append(snapshot.used_tokens)
        charts = [Text(self._chart(name), style=COLORS[name]) for name in self.pool]
        live.update(Text("\n").join([Text(describe_load(snapshot), style="dim"), *charts]))

    def _plain_lines(self, name: str, history: list[float]) -> Callable[[Snapshot], None]:
        last = time.monotonic()

        def show(snapshot: Snapshot) -> None:
            nonlocal last
            history.append(snapshot.used_tokens)
            if time.monotonic() - last >= QUIET_S:
                last = time.monotonic()
                self.console.print(f"{name}: {describe_load(snapshot)}", markup=False)

        return show

    def _chart(self, name: str) -> str:
        """The pool in a round; all rounds share the scale."""
        most = max((value for history in self.pool.values() for value in history), default=0.0)
        values = self.pool[name]
        width = self.console.width - CHART_LABEL
        # a round has about a hundred looks: every second one, or every third, where the terminal is narrow
        step = -(-len(values) // width) if values else 1
        chart = sparkline(values[::step], most, width)
        return f"{f'pool, {name}: at most {max(values, default=0):.0f}':<{CHART_LABEL}}{chart}"

    def compare(self, prompt: str, dense: Answer, compressed: Answer) -> None:
        """One prompt's answers: two columns, or one after the other where columns would be cut."""
        if not self.console.is_terminal:
            for name, answer in (("dense", dense), ("compressed", compressed)):
                self.console.print(f"\n{prompt}\n{heading(name, answer)}:\n{answer.text}", markup=False)
            return
        table = Table(title=Text(prompt), expand=True, show_lines=False)
        for name, answer in (("dense", dense), ("compressed", compressed)):
            table.add_column(Text(heading(name, answer), style=COLORS[name]), ratio=1)
        table.add_row(Text(dense.text), Text(compressed.text))
        self.console.print(table)

    def summarise(self, state: Mapping[str, Any], reports: Sequence[Mapping[str, Any]]) -> None:
        """What the compressed requests held, and what the server did."""
        table = Table("", *(f"prompt {i + 1}" for i in range(len(reports))), title="the compressed requests")
        for name, cell in REPORT_ROWS:
            table.add_row(name, *(cell(report) for report in reports))
        for name in ("dense_pages", "held_pages"):
            megabytes = [report[name] * state["page_bytes"] / 1e6 for report in reports]
            table.add_row(f"KV, {name.removesuffix('_pages')}", *(f"{value:.1f} MB" for value in megabytes))
        self.console.print(table)
        dense, held = (sum(report[key] for report in reports) for key in ("dense_pages", "held_pages"))
        returned = state["freed_pages"] - state["allocated_pages"]
        lines = [
            f"events: {state['select_events']} select, {state['condense_events']} condense, "
            f"{state['postponed_events']} postponed",
            f"token pages returned to SGLang while requests ran: {returned}",
            f"KV held at the end: {held} of {dense} token pages, {100 * held / max(1, dense):.0f} % of dense",
            *(
                f"pool at its fullest, {name}: {max(values, default=0):.0f} tokens"
                for name, values in self.pool.items()
            ),
        ]
        self.console.print("\n".join(lines), markup=False)


REPORT_ROWS: tuple[tuple[str, Callable[[Mapping[str, Any]], str]], ...] = (
    ("tokens of KV", lambda r: f"{r['num_tokens']}"),
    ("select / condense events", lambda r: f"{r['select_events']} / {r['condense_events']}"),
    ("kept tokens per head, mean", lambda r: f"{r['kept_mean']:.0f}"),
    ("kept tokens per head, p10 / p90 / max", lambda r: f"{r['kept_p10']:.0f} / {r['kept_p90']:.0f} / {r['kept_max']}"),
    ("token pages, dense", lambda r: f"{r['dense_pages']}"),
    ("token pages, held", lambda r: f"{r['held_pages']}"),
    ("token pages, freed while running", lambda r: f"{r['dense_pages'] - r['held_pages']}"),
)


def heading(name: str, answer: Answer) -> str:
    """What stands over an answer."""
    return f"{name}, {answer.num_tokens} tokens{'' if answer.is_complete else ', cut off'}"


def describe_load(snapshot: Snapshot) -> str:
    """A snapshot on one line."""
    return (
        f"{snapshot.running_requests} answers under way, pool {snapshot.used_tokens} of {snapshot.pool_tokens} tokens, "
        f"{snapshot.condense_events} condense events"
    )
