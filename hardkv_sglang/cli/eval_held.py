"""What the running requests of a server hold while it generates, looked at from outside again and again."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from hardkv_sglang.cli.snapshot import ServerView, Snapshot, SnapshotError

INTERVAL_S = 0.5


@dataclass(frozen=True)
class Look:
    """One moment. Pages are those of the running requests' output, recent window included, prompt left out."""

    seconds: float
    running_requests: int
    output_pages: int
    dense_output_pages: int


class HeldWatch:
    """Context in which a thread looks at the server every half second.

    A server that does not compress or stops answering ends the looking, not the block: the requests of the block
    themselves tell what is wrong.
    """

    def __init__(self, url: str, first_token: int, page_size: int) -> None:
        self._view = ServerView(url)
        self._first_pages = first_token / page_size
        self._looks: list[Look] = []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> HeldWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        started = time.monotonic()
        while not self._end.wait(INTERVAL_S):
            try:
                found = self._view.read()
            except SnapshotError:
                return
            self._add(found, time.monotonic() - started)

    def _add(self, found: Snapshot, seconds: float) -> None:
        # what requests hold before the first token that counts is no part of the result
        if found.dense_output_pages > self._first_pages * found.running_requests:
            look = Look(round(seconds, 2), found.running_requests, found.output_pages, found.dense_output_pages)
            self._looks.append(look)

    def report(self) -> dict[str, Any]:
        """`held`: pages over those of dense KV, sums over all looks; None without any. `held_over_time`: the looks."""
        dense = sum(look.dense_output_pages for look in self._looks)
        held = sum(look.output_pages for look in self._looks) / dense if dense else None
        return {"held": held, "held_over_time": [vars(look) for look in self._looks]}
