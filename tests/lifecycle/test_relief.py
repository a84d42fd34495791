"""Relief and the planner's table, against what each request's state says by itself."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from engine.simulated_serving import Request, Serving
from lifecycle import relief_definition as definition

from hardkv_sglang.config import HardKVConfig
from hardkv_sglang.lifecycle.relief import PressureRelief
from hardkv_sglang.lifecycle.request_state import View
from hardkv_sglang.lifecycle.step_plan import EarlyEvents
from hardkv_sglang.lifecycle.tiers import Stage

SHORT = HardKVConfig(recent_tokens=32, query_window=16, select_interval=64, condense_interval=64, min_tokens=8)


class Compared:
    """Every choice of relief, and whether it rescued a step, compared with the definition."""

    def __init__(self, serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stages: Counter[Stage] = Counter()
        self.early_events = self.rescues = 0
        self.serving = serving
        self.stock_choose, self.stock_is_rescue = PressureRelief.choose, PressureRelief.is_rescue
        monkeypatch.setattr(serving.relief, "choose", self.choose)
        monkeypatch.setattr(serving.relief, "is_rescue", self.is_rescue)

    def choose(self, views: Sequence[View], seq_lens: Sequence[int], available_pages: int) -> EarlyEvents:
        relief = self.serving.relief
        rows = np.array([state.row for state, _ in views], np.int64)
        lens = np.array([seq_len for _, seq_len in views], np.int64)
        stages, gains = relief.rank(rows, lens)
        for i, view in enumerate(views):
            assert (stages[i], gains[i]) == (definition.stage_of(relief, *view), definition.gain_of(relief, *view))
        self.stages.update(map(Stage, stages.tolist()))
        assert relief.reserve(rows, lens, np.array(seq_lens, np.int64)) == definition.reserve(relief, views, seq_lens)
        chosen = self.stock_choose(relief, views, seq_lens, available_pages)
        assert chosen == definition.choose(relief, views, seq_lens, available_pages)
        self.early_events += len(chosen.events)
        return chosen

    def is_rescue(self, seq_lens: Sequence[int], available_pages: int) -> bool:
        relief, states = self.serving.relief, self.serving.states
        answer = self.stock_is_rescue(relief, seq_lens, available_pages)
        views = [(state, state.seq_len) for state in states.values()]
        assert answer == definition.is_rescue(relief, views, seq_lens, available_pages)
        self.rescues += answer
        return answer


@pytest.mark.parametrize(("top_p", "bits"), [(0.9, 16), (1.0, 16), (0.9, 4)])
def test_choices_are_those_of_the_definition(monkeypatch: pytest.MonkeyPatch, top_p: float, bits: int) -> None:
    """In every stage of a request's life, some of them opted out, in a pool that is short of pages."""
    rng = random.Random(5)
    requests = [Request(str(i), rng.randrange(1, 150), 500, 500, ignore_eos=True) for i in range(30)]
    for req in requests[::9]:
        req.custom_params = {"kv_compression": "none"}
    options = SHORT.with_options(top_p=top_p, max_tokens=96, survivor_bits=bits)
    serving = Serving(
        options,
        230 if bits == 16 else 200,
        [],
        lambda r, aged: int(max(8, r.uniform(0.1, 1.0) * aged)),
        is_checked=True,
    )
    serving.force(requests)
    compared = Compared(serving, monkeypatch)
    serving.run()
    assert compared.early_events > 50
    assert compared.rescues > 0
    assert all(compared.stages[stage] > 0 for stage in Stage), compared.stages
