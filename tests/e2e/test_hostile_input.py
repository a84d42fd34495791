"""Hostile requests end no server, leak nothing, and get the status code that stock SGLang gives.

`make test` sends 100, always the same; `make fuzz` sends 2000 others.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
from e2e.compressed import STRICT, TINY, TINY_STOCK, two_layers
from e2e.hostile_cases import Case, generate_cases
from e2e.hostile_client import neighbour, probe, send
from e2e.hostile_expectations import ENDS_STOCK, OUR_REASONS, reason
from e2e.server import ServerPool

from hardkv_sglang.cli.server_process import ServerProcess as Server

Get = Callable[[], Server]
pytestmark = two_layers
ALONE = "/release_memory_occupation"  # asserts that nothing runs: with a request beside it, stock SGLang ends
HEAD_START_S = 0.03  # of the request that runs beside a case
PROGRESS_INTERVAL = 50  # cases


@dataclass(frozen=True)
class Expected:
    """What a server says when it is well; None: no request runs beside the cases."""

    probe: list[int]
    neighbour: list[int] | None


def harm(server: Server, case: Case, expected: Expected) -> tuple[str, str | None]:
    """The answer to a case, and what it did to the server and to the request that ran beside it, if anything."""
    is_watched = expected.neighbour is not None and case.path != ALONE
    with ThreadPoolExecutor(1) as executor:
        beside = executor.submit(neighbour, server) if is_watched else None
        time.sleep(HEAD_START_S)
        answer = send(server, case)
    try:
        tokens = beside.result() if beside is not None else None
        if tokens is not None and tokens != expected.neighbour:
            return answer, f"the request beside it got {tokens} instead of {expected.neighbour}"
        tokens = probe(server)
    except (OSError, AssertionError, LookupError, ValueError) as error:  # no answer, an answer of no use
        return answer, f"{type(error).__name__}: {error}"
    if tokens != expected.probe:
        return answer, f"a fixed request gave {tokens} instead of {expected.probe}"
    return answer, None


class Comparison:
    """Sends cases to both servers; those that have ended start again."""

    def __init__(self, ours: Get, stock: Get) -> None:
        self._ours, self._stock = ours, stock
        self._expected = Expected(probe(ours()), neighbour(ours()))
        self._stock_expected = Expected(probe(stock()), None)
        self._stock_beside = Expected(self._stock_expected.probe, neighbour(stock()))

    def wrong(self, case: Case) -> str | None:
        """What is wrong with our answer to a case, or with the table of those that stock does not survive."""
        ours, stock = self._ours(), self._stock()
        with ThreadPoolExecutor(1) as executor:
            of_stock = executor.submit(harm, stock, case, self._stock_expected)
            answer, damage = harm(ours, case, self._expected)
            stock_answer, stock_damage = of_stock.result()
        if stock_damage is not None:
            return f"stock: {stock_answer}, then {stock_damage}; ours: {answer}, then {damage}: a row for ENDS_STOCK?"
        if damage is not None:
            beside = harm(self._stock(), case, self._stock_beside)  # stock was alone with the case
            return f"{answer}, then {damage}; stock answers {stock_answer}, and beside a request {beside}"
        if answer != stock_answer and reason(OUR_REASONS, case) is None:
            return f"{answer}; stock answers {stock_answer}"
        return None


def run(cases: list[Case], comparison: Comparison) -> list[str]:
    """Send all cases; what was wrong, each with its case."""
    findings, left_out, start = [], Counter[str](), time.monotonic()
    for number, case in enumerate(cases, start=1):
        known = reason(ENDS_STOCK, case)
        wrong = comparison.wrong(case) if known is None else None
        if known is not None:
            left_out[known.name if known.is_seen else f"{known.name} (read in the code)"] += 1
        if wrong is not None:
            findings.append(f"case {number}: {wrong}\n  {case}")
            print(findings[-1], flush=True)
        if number % PROGRESS_INTERVAL == 0:
            seconds = time.monotonic() - start
            print(f"{number} of {len(cases)} cases, {len(findings)} findings, {seconds:.0f} s", flush=True)
    print(f"left out, because stock SGLang ends: {dict(left_out)}")
    return findings


def test_hostile_requests(server_pool: ServerPool, request: pytest.FixtureRequest) -> None:
    count, seed = (int(request.config.getoption(name)) for name in ("--hostile-cases", "--hostile-seed"))
    print(f"{count} cases of seed {seed}; again: pytest {__file__} --hostile-cases {count} --hostile-seed {seed}")
    cases = generate_cases(count, seed)
    comparison = Comparison(lambda: server_pool.get(TINY, STRICT), lambda: server_pool.get(TINY_STOCK, STRICT))
    findings = run(cases, comparison)
    assert not findings, "\n".join(findings)
    server_pool.get(TINY, STRICT).check_idle()
