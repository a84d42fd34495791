"""Clients that send one request after the other, and an operator who disturbs them."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.soak.client import AbortedError, Client, SoakError
from bench.soak.kinds import ABORTED, FINISHED, Job, Kind

MAX_FAILURES = 20
"""After that many the load stops: the first ones explain more."""


@dataclass(frozen=True)
class Failure:
    """A request that got no good answer, with all that it takes to send it again."""

    kind: str  # of request, or an operation
    error: str  # type of the exception
    message: str
    status: int | None  # of the answer, where it is the status that is wrong
    after_s: float  # since the load began
    path: str | None
    parameters: Any  # what was sent
    operations: dict[str, int]  # of the operator until then

    def __str__(self) -> str:
        return f"{self.kind} after {self.after_s:.0f} s: {self.error}: {self.message}"


@dataclass
class Record:
    """What happened so far. Written by all threads."""

    ends: Counter[tuple[str, str]] = field(default_factory=Counter)  # by kind and end
    operations: Counter[str] = field(default_factory=Counter)  # of the operator
    failures: list[Failure] = field(default_factory=list)
    start: float = field(default_factory=time.monotonic)
    running: int = 0  # requests that wait for their answer
    aborts: int = 0  # of everything; odd while one is under way
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def num_requests(self) -> int:
        """Requests that were answered, well or not."""
        return sum(self.ends.values()) + len(self.failures)

    @property
    def num_finished(self) -> int:
        """Requests that nobody ended before their time."""
        with self.lock:
            return sum(number for (_, end), number in self.ends.items() if end == FINISHED)

    def fail(self, kind: str, error: Exception, client: Client) -> None:
        """Note and print something that must not happen; it was the client's last request."""
        path, parameters = client.sent or (None, None)
        status, seconds = getattr(error, "status", None), time.monotonic() - self.start
        with self.lock:
            failure = Failure(
                kind, type(error).__name__, str(error), status, seconds, path, parameters, dict(self.operations)
            )
            self.failures.append(failure)
        print(failure, flush=True)


@dataclass
class Load:
    """Runs until the deadline; each client then waits for its last answer."""

    url: str
    kinds: Sequence[Kind]
    num_clients: int
    max_prompt: int  # tokens
    max_output: int  # tokens
    seed: int
    deadline: float  # of time.monotonic()
    record: Record = field(default_factory=Record)

    def start(self) -> list[threading.Thread]:
        """Threads of all clients and of the operator, which end by themselves."""
        bodies: list[Callable[[], None]] = [self._operate]
        bodies += [lambda number=number: self._serve(number) for number in range(self.num_clients)]  # type: ignore[misc]
        threads = [threading.Thread(target=body, daemon=True) for body in bodies]
        for thread in threads:
            thread.start()
        return threads

    @property
    def is_over(self) -> bool:
        """Whether no further request starts."""
        return time.monotonic() > self.deadline or len(self.record.failures) >= MAX_FAILURES

    def _serve(self, number: int) -> None:
        rng, client = random.Random(f"{self.seed} client {number}"), Client(self.url)
        weights = [kind.weight for kind in self.kinds]
        while not self.is_over:
            (kind,) = rng.choices(self.kinds, weights)
            self._run(kind, Job(client, rng, self.max_prompt, self.max_output))

    def _run(self, kind: Kind, job: Job) -> None:
        record = self.record
        with record.lock:
            record.running += 1
            aborts = record.aborts
        abort = AbortedError("the answer says so")
        try:
            end = kind.run(job)
        except AbortedError as error:
            end, abort = ABORTED, error
        except (SoakError, ValueError, LookupError, TypeError) as error:  # of whatever shape the answer is
            record.fail(kind.name, error, job.client)
            return
        finally:
            with record.lock:
                record.running -= 1
        was_asked_for = kind.may_abort or aborts % 2 or aborts != record.aborts
        if end == ABORTED and not was_asked_for:
            record.fail(
                kind.name, AbortedError(f"aborted, though nobody asked for it: {abort}", abort.status), job.client
            )
            return
        with record.lock:
            record.ends[kind.name, end] += 1

    def _operate(self) -> None:
        rng, client = random.Random(f"{self.seed} operator"), Client(self.url)
        operations = (pause_in_place, pause_by_retraction, flush, pause_and_abort, abort_everything)
        while not self.is_over:
            self._wait(rng.uniform(2, 15))
            operation = rng.choice(operations)
            try:
                operation(client, self.record)
            except SoakError as error:
                self.record.fail(operation.__name__, error, client)
                continue
            self.record.operations[operation.__name__.replace("_", " ")] += 1

    def _wait(self, seconds: float) -> None:
        """So long at least, and until as many requests have finished as there are clients: on a slow server, too, most
        requests live to see their events."""
        finished, start = self.record.num_finished, time.monotonic()
        while not self.is_over:
            enough = self.record.num_finished - finished >= self.num_clients
            if enough and time.monotonic() - start >= seconds:
                return
            time.sleep(0.1)


def pause_in_place(client: Client, _record: Record) -> None:
    """Everything stands still for a moment."""
    client.ask("/pause_generation", {"mode": "in_place"})
    time.sleep(1.0)
    client.ask("/continue_generation", {})


def pause_by_retraction(client: Client, _record: Record) -> None:
    """What runs goes back to the queue, and the cache is emptied meanwhile."""
    client.ask("/pause_generation", {"mode": "retract"})
    client.post("/flush_cache")
    client.ask("/continue_generation", {})


def flush(client: Client, _record: Record) -> None:
    """Refused while anything runs, and then without consequences."""
    status = client.post("/flush_cache").status_code
    if status not in (200, 400):
        raise SoakError(f"status {status}")


def pause_and_abort(client: Client, record: Record) -> None:
    """A pause that ends everything."""
    record.aborts += 1
    client.ask("/pause_generation", {"mode": "abort"})
    client.ask("/continue_generation", {})
    record.aborts += 1


def abort_everything(client: Client, record: Record) -> None:
    """An abort of all requests."""
    record.aborts += 1
    client.abort(everything=True)
    record.aborts += 1
