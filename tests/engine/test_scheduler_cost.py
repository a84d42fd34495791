"""What the scheduler does of ours for each running request is in compiled loops: no Python function runs for each."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType

from engine.simulated_serving import Request, Serving

from hardkv_sglang.config import HardKVConfig
from hardkv_sglang.lifecycle.request_state import View

OPTIONS = HardKVConfig(recent_tokens=64, query_window=32, select_interval=128, condense_interval=128)


def python_calls(function: Callable[[], object]) -> int:
    """Python frames that run, generators counted each time that they go on."""
    calls = 0

    def count(_frame: FrameType, event: str, _argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls


def serving_of(num_running: int) -> Serving:
    """A server with requests that have selected and condensed, and that a pass over its queue has seen."""
    serving = Serving(OPTIONS, 40 * num_running, [], lambda _rng, aged: aged // 3)
    serving.force([Request(str(i), 40, 2000, 2000, ignore_eos=True) for i in range(num_running)])
    for _ in range(600):
        serving.decode()
    serving.admission.warm_up()
    candidate(serving)
    return serving


def candidate(serving: Serving) -> bool:
    req = Request("next", 40, 2000, 2000, ignore_eos=True)
    return serving.admission.open(serving.running).fits(1 << 40, [], req)


def views_of(serving: Serving) -> list[View]:
    return [(serving.states[req], req.kv_committed_len) for req in serving.running]


def test_no_python_runs_for_each_running_request() -> None:
    few, many = serving_of(6), serving_of(60)
    for serving in (few, many):
        assert all(state.num_condenses for state in serving.states.values())
        while any(seq_len >= state.wakes_at for state, seq_len in views_of(serving)):
            serving.decode()
    assert python_calls(lambda: candidate(few)) == python_calls(lambda: candidate(many))

    def plan(serving: Serving) -> int:
        views = views_of(serving)
        return python_calls(lambda: serving.planner.plan(views, serving.pool))

    assert plan(few) == plan(many)

    def relieve(serving: Serving) -> int:
        views = views_of(serving)
        lens = [seq_len for _, seq_len in views]
        assert serving.relief.choose(views, lens, 0).hurry
        return python_calls(lambda: serving.relief.choose(views, lens, 0))

    assert relieve(few) == relieve(many)
