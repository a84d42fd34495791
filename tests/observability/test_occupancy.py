"""Occupancy against a page pool that knows what every row holds."""

from __future__ import annotations

import pytest
from lifecycle.page_pool import PAGE, PagePool, make_planner, start

from hardkv_sglang.lifecycle.request_state import RequestState
from hardkv_sglang.lifecycle.tiers import COUNT_DELAY
from hardkv_sglang.observability.occupancy import Occupancy


def owned_pages(pool: PagePool, states: list[RequestState]) -> int:
    """Pages past the dense prefixes, from the rows and the condensed pages themselves."""
    rows = sum(index >= state.prefix_end // PAGE for state in states for index in pool.rows[state.row])
    return rows + sum(len(state.condensed_slots or []) for state in states)


def test_sums_agree_with_the_pool() -> None:
    planner, pool = make_planner(), PagePool(200)
    states = [start(planner, pool, row, prompt_len) for row, prompt_len in ((1, 40), (2, 90))]
    ratios = []
    for step in range(400):
        for state in states:
            state.seq_len = (40, 90)[state.row - 1] + step
            if state.seq_len == state.selected_at + COUNT_DELAY - 1:
                planner.settle(state, 4, [10, 10, 10, 10])
        planner.plan([(state, state.seq_len) for state in states], pool)
        occupancy = Occupancy.of(states, PAGE)
        assert occupancy.output_pages == owned_pages(pool, states)
        assert occupancy.condensed_pages == sum(len(state.condensed_slots or []) for state in states)
        assert occupancy.condensed_tokens == sum(state.condensed_end - state.prefix_end for state in states)
        assert occupancy.sparse_tokens == sum(state.recent_start - state.condensed_end for state in states)
        ratios.append(occupancy.kept_ratio)
        for state in states:
            pool.extend_row(state.row, state.seq_len + 1)
    assert ratios[0] == 1  # 40 prompt tokens end in the first page of the output, which is still empty
    assert 0 < ratios[-1] < 0.5
    dense = sum(-(-(state.seq_len - state.prefix_end) // PAGE) for state in states)
    assert occupancy.dense_output_pages == dense
    assert occupancy.to_dict()["kept_ratio"] == pytest.approx(occupancy.output_pages / dense)


def test_nothing_runs() -> None:
    assert Occupancy.of([], PAGE) == Occupancy(0, 0, 0, 0, 0)
    assert Occupancy.of([], PAGE).kept_ratio == 1
