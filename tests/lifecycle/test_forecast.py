"""The forecast against its definition: every request looked at at every step, from scratch for every candidate."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from engine.simulated_serving import Request, Serving
from hypothesis import given, settings
from hypothesis import strategies as st
from lifecycle import relief_definition
from lifecycle.forecast_definition import need, new_outlook, peak_growth, running_outlook
from lifecycle.page_pool import PAGE

from hardkv_sglang.config import HardKVConfig
from hardkv_sglang.engine.admission import AdmissionPass
from hardkv_sglang.lifecycle.expectation import KeptShare
from hardkv_sglang.lifecycle.forecast import OutlookStack, UsageForecast
from hardkv_sglang.lifecycle.usage_peak import CONDENSED, Outlook
from hardkv_sglang.memory_pool.layout import PoolLayout
from hardkv_sglang.memory_pool.resolved_config import ResolvedConfig

SHORT = HardKVConfig(recent_tokens=32, query_window=16, select_interval=64, condense_interval=64, min_tokens=8)


def draw_outlook(rng: random.Random) -> Outlook:
    dense, condensed = rng.randrange(-31, 3000), rng.choice((0, PAGE * rng.randrange(200)))
    most = rng.choice((0, 1, rng.randrange(200), rng.randrange(20000)))
    return Outlook(
        prompt=PAGE * rng.randrange(30),
        held=max(0, -(-dense // PAGE) * PAGE) + condensed,
        dense=dense,
        condensed=condensed,
        aged=PAGE * rng.randrange(300),
        first_condense=rng.choice((math.inf, rng.randrange(-50, 2000), 640)),
        expected_steps=rng.choice((most, min(most, rng.uniform(1, 3000)))),
        most_steps=most,
    )


def draw_forecast(rng: random.Random) -> tuple[UsageForecast, KeptShare]:
    options = HardKVConfig(
        select_interval=rng.choice((128, 512)),
        max_tokens=rng.choice((4096, 256, None)),
        survivor_bits=rng.choice((16, 8, 4)),
    )
    layout = PoolLayout(2, 2, 64, PAGE, PAGE * 1001, survivor_bits=options.survivor_bits)
    forecast, kept = UsageForecast(ResolvedConfig(options, layout, 4, 0.125, 513, 40960)), KeptShare(512)
    for _ in range(rng.randrange(40)):
        aged = 512 * rng.randrange(1, 20)
        kept.add(int(aged * rng.random()), aged)
    return forecast, kept


def stack_of(outlooks: list[Outlook]) -> OutlookStack:
    return OutlookStack(np.array(outlooks, dtype=np.float64))


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 10**9),
    num=st.integers(1, 200),
    pushed=st.integers(0, 80),
    events_per_step=st.sampled_from([1, 2, 3, 4, 7]),
)
def test_growth_is_that_of_the_definition(seed: int, num: int, pushed: int, events_per_step: int) -> None:
    """For requests looked at together, and for others pushed after them, taken away, and pushed again."""
    rng = random.Random(seed)
    forecast, kept = draw_forecast(rng)
    outlooks = [draw_outlook(rng) for _ in range(num)]
    stack = stack_of(outlooks)
    for outlook in [draw_outlook(rng) for _ in range(rng.randrange(3))]:
        stack.push(outlook)
    stack.truncate(num)
    for _ in range(pushed):
        outlooks.append(draw_outlook(rng))
        stack.push(outlooks[-1])
    expected = peak_growth(forecast, outlooks, kept, events_per_step)
    assert forecast.growth(stack, kept, events_per_step) == expected


class Compared:
    """Passes whose every decision is compared with the definition."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.decisions = self.refusals = self.followers = self.differences = 0
        stock = AdmissionPass.fits

        def fits(admission_pass: AdmissionPass, free_tokens: int, admitted: list[Request], req: Request) -> bool:
            answer = stock(admission_pass, free_tokens, admitted, req)
            if admission_pass.running or admitted:
                needed = need(admission_pass.admission, admission_pass.running, admitted, req)
                self.decisions += 1
                self.refusals += not answer
                self.differences += answer != (needed <= free_tokens)
                self.followers += len(admitted) > 0
                assert admission_pass.needed == needed
            return answer

        monkeypatch.setattr(AdmissionPass, "fits", fits)


@pytest.mark.parametrize("lengths", ["equal", "known", "unknown"])
@pytest.mark.parametrize(("num_pages", "bits"), [(300, 16), (300, 4), (800, 16), (12000, 16)])
def test_decisions_are_those_of_the_definition(
    monkeypatch: pytest.MonkeyPatch, lengths: str, num_pages: int, bits: int
) -> None:
    compared = Compared(monkeypatch)
    rng = random.Random(num_pages)
    requests = []
    for i in range(150):
        num_output = 250 if lengths == "equal" else rng.randrange(1, 500)
        most = num_output if lengths != "unknown" else 2000
        requests.append(Request(str(i), rng.randrange(1, 400), num_output, most, ignore_eos=lengths != "unknown"))
    options = SHORT.with_options(survivor_bits=bits)
    serving = Serving(options, num_pages, requests, lambda r, aged: int(max(8, r.uniform(0.1, 0.5) * aged)))
    serving.run()
    assert compared.decisions > 140
    assert compared.differences == 0
    # one after another in a large pool, around the limit in a small one
    assert compared.refusals > 0 if num_pages < 12000 else compared.followers > 80, vars(compared)


def test_outlooks_of_all_are_those_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """In every state of a request's life, with early events and retractions."""
    rng = random.Random(3)
    requests = [Request(str(i), rng.randrange(1, 200), 400, 400, ignore_eos=rng.random() < 0.5) for i in range(30)]
    for req in requests[::7]:
        req.custom_params = {"kv_compression": "none"}
    serving = Serving(SHORT, 220, [], lambda r, aged: int(max(8, r.uniform(0.1, 0.9) * aged)))
    serving.force(requests)
    admission, seen = serving.admission, 0
    while serving.running or serving.waiting:
        outlooks, reserve = admission.running_outlooks(serving.running)
        for i, req in enumerate(serving.running):
            assert tuple(outlooks[i]) == tuple(running_outlook(admission, req))
            seen += outlooks[i, CONDENSED] > 0
        views = [(serving.states[r], r.kv_committed_len) for r in serving.running if r in serving.states]
        assert reserve == relief_definition.copy_pages(serving.relief, views) * PAGE
        for req in serving.waiting:
            assert tuple(admission.new_outlook(req)) == tuple(new_outlook(admission, req))
        if not serving.prefill():
            serving.decode()
    assert seen > 1000
    assert sum(r.retractions for r in requests) > 0
