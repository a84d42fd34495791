"""The planner against a page allocator that proves ownership: random lives of many requests."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lifecycle.page_pool import OPTIONS, PAGE, PagePool, make_planner, start

from hardkv_sglang.config import HardKVConfig
from hardkv_sglang.lifecycle.planner import LifecyclePlanner
from hardkv_sglang.lifecycle.request_state import RequestState
from hardkv_sglang.lifecycle.step_plan import EarlyEvents, ObserveOp
from hardkv_sglang.lifecycle.tiers import COUNT_DELAY
from hardkv_sglang.memory_pool.integrity import IntegrityError, check_ownership


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), num_pages=st.sampled_from([60, 120, 400]))
def test_random_lives_conserve_pages(seed: int, num_pages: int) -> None:
    rng, planner, pool = random.Random(seed), make_planner(), PagePool(num_pages)
    running: dict[int, tuple[RequestState, int]] = {}
    waiting: list[tuple[int, RequestState]] = []  # select events whose counts are in flight, by due step
    for step in range(300):
        if len(running) < 6 and rng.random() < 0.1 and len(pool.free) > 20:
            row = next(r for r in range(1, 64) if r not in running)
            prompt_len = rng.randrange(1, 200)
            running[row] = (start(planner, pool, row, prompt_len), prompt_len)
        for due, state in [entry for entry in waiting if entry[0] <= step]:
            waiting.remove((due, state))
            if not state.released:
                candidates = state.longest_list + state.sparse_span
                counts = [rng.randrange(0, candidates + 1) for _ in range(4)]
                planner.settle(state, sum(-(-n // PAGE) for n in counts), counts)
        pool.log.clear()
        plan = planner.plan(list(running.values()), pool)
        if "free" in pool.log:
            assert "alloc" not in pool.log[pool.log.index("free") :]
        assert len(plan.selects) + len(plan.condenses) <= OPTIONS.max_events_per_step
        waiting += [(step + rng.choice((1, 2)), op.state) for op in plan.selects]
        for row, (state, seq_len) in list(running.items()):
            check_ranges(planner, state, seq_len)
            if rng.random() < 0.01 or not pool.extend_row(row, seq_len + 1):
                left = planner.release(state, seq_len, pool)
                pool.free_row(row, 0, left)
                del running[row], pool.rows[row]
            else:
                running[row] = (state, seq_len + 1)
        pool.check([state for state, _ in running.values()], num_pages)
        slots = [state.ring_slot for state, _ in running.values() if state.ring_slot is not None]
        assert sorted(slots + planner.free_ring_slots) == list(range(planner.cfg.num_ring_slots))


def test_requests_wait_for_a_ring_slot() -> None:
    """Requests that started together get their select events one group after the other, none is forgotten."""
    options = OPTIONS.with_options(select_interval=256, condense_interval=256, max_events_per_step=100)
    planner, pool = make_planner(options), PagePool(4000)
    planner.free_ring_slots = [7, 5]
    states = {row: start(planner, pool, row, 40) for row in range(1, 6)}
    selected = {}
    for seq_len in range(40, 500):
        plan = planner.plan([(state, seq_len) for state in states.values()], pool)
        selected.update({op.row: seq_len for op in plan.selects if op.row not in selected})
        assert all(op.ring_slot in (5, 7) for op in plan.selects)
        for row in states:
            pool.extend_row(row, seq_len + 1)
    first, window = min(selected.values()), options.query_window
    # one event a step for five requests; a slot is free again in the step after its event
    assert [n - first for n in sorted(selected.values())] == [0, 1, window + 1, window + 2, 2 * window + 2]
    for state in states.values():
        planner.release(state, 500, pool)
    assert sorted(planner.free_ring_slots) == [5, 7]


def check_ranges(planner: LifecyclePlanner, state: RequestState, seq_len: int) -> None:
    assert state.prefix_end <= state.condensed_end <= state.recent_start
    assert all(x % PAGE == 0 for x in (state.prefix_end, state.condensed_end, state.recent_start))
    assert state.sparse_span <= planner.cfg.max_sparse_span
    if state.is_compressed:
        assert state.recent_start + OPTIONS.recent_tokens <= seq_len


def test_schedule_of_one_request() -> None:
    planner, pool = make_planner(), PagePool(100)
    state = start(planner, pool, 1, 40)
    events = []
    for seq_len in range(40, 300):
        if seq_len == state.selected_at + COUNT_DELAY - 1:
            planner.settle(state, 4, [10, 10, 10, 10])
        plan = planner.plan([(state, seq_len)], pool)
        events += [("select", seq_len, op.recent_start) for op in plan.selects]
        events += [("condense", seq_len, op.end) for op in plan.condenses]
        pool.extend_row(1, seq_len + 1)
    # the prefix ends at 64; a select every 32 tokens once 32 have left the window of 32; a condense per 64
    assert events == [
        ("select", 128, 96), ("select", 160, 128), ("condense", 162, 128),
        ("select", 192, 160), ("select", 224, 192), ("condense", 226, 192),
        ("select", 256, 224), ("select", 288, 256), ("condense", 290, 256),
    ]  # fmt: skip


def test_queries_are_observed_under_one_attended_set() -> None:
    planner, pool = make_planner(), PagePool(100)
    state = start(planner, pool, 1, 40)
    changed_at = 0
    for seq_len in range(40, 300):
        if seq_len == state.selected_at + COUNT_DELAY - 1:
            planner.settle(state, 4, [10, 10, 10, 10])
        plan = planner.plan([(state, seq_len)], pool)
        for op in plan.selects:
            assert op.seq_len - op.first_query == OPTIONS.query_window
            assert op.first_query >= changed_at
        if plan.selects or plan.condenses:
            changed_at = seq_len
        pool.extend_row(1, seq_len + 1)


def test_a_full_pool_postpones_and_later_condenses() -> None:
    planner, pool = make_planner(), PagePool(10)
    state, condensed_at = start(planner, pool, 1, 40), []
    for seq_len in range(40, 256):
        if seq_len == state.selected_at + COUNT_DELAY - 1:
            planner.settle(state, 5, [40, 10, 10, 10])
        hostage, pool.free = (pool.free, []) if seq_len < 200 else ([], pool.free)
        plan = planner.plan([(state, seq_len)], pool)
        pool.free += hostage
        condensed_at += [seq_len] * len(plan.condenses)
        assert pool.extend_row(1, seq_len + 1)
    assert condensed_at[0] == 200
    pool.check([state], 10)


def test_retracted_request_starts_over_without_old_queries() -> None:
    planner = make_planner()
    # 40 prompt and 300 output tokens re-prefilled: nothing was observed yet
    state = planner.admit(1, 40, 32, 340)
    assert (state.prefix_end, state.observe_from) == (64, 340)
    pool = PagePool(100)
    assert planner.plan([(state, 340)], pool).observes
    assert not planner.plan([(state, 340 + OPTIONS.query_window - 1)], pool).selects
    (op,) = planner.plan([(state, 340 + OPTIONS.query_window)], pool).selects
    assert op.first_query == 340
    assert op.recent_start == 64 + planner.cfg.max_sparse_span


def test_release_before_the_first_event_is_stock() -> None:
    planner, pool = make_planner(), PagePool(100)
    state = start(planner, pool, 1, 40)
    assert planner.release(state, 40, pool) == 40
    assert pool.log == []


def events_of(options: HardKVConfig, survivors: int, num_tokens: int) -> tuple[list[int], list[int]]:
    """Lengths at which one request selects and condenses, when its lists need `survivors` pages for each that they
    could keep, out of 4."""
    planner, pool = make_planner(options), PagePool(400)
    state = start(planner, pool, 1, 40)
    selects, condenses = [], []
    for seq_len in range(40, 40 + num_tokens):
        if state.sparse_span and seq_len == state.selected_at + COUNT_DELAY - 1:
            pages = state.num_condensed_pages + state.sparse_span // PAGE
            planner.settle(state, pages * survivors, [pages * PAGE * survivors // 4] * 4)
        plan = planner.plan([(state, seq_len)], pool)
        selects += [seq_len] * len(plan.selects)
        condenses += [seq_len] * len(plan.condenses)
        pool.extend_row(1, seq_len + 1)
    return selects, condenses


def test_no_event_where_nothing_can_be_dropped() -> None:
    exact = OPTIONS.with_options(top_p=1.0, max_tokens=None)
    assert events_of(exact, 4, 600) == ([], [])
    selects, condenses = events_of(exact.with_options(min_freed_pages=0), 4, 600)
    assert len(selects) > 10
    assert len(condenses) > 5


def test_a_condense_event_that_would_only_copy_waits_until_the_sparse_tier_is_full() -> None:
    selects, condenses = events_of(OPTIONS, 4, 600)
    # the span may hold 128: its last page makes the condense event due, which an interval of 64 would do earlier
    spans = [b - a for a, b in pairwise(condenses)]
    assert set(spans) == {128}
    assert events_of(OPTIONS, 2, 600)[1][1] - events_of(OPTIONS, 2, 600)[1][0] == 64
    assert len(selects) > len(condenses)


@pytest.mark.parametrize(
    ("options", "first_select"),
    [
        ({}, 128),
        ({"min_tokens": 32}, 160),  # 32 tokens would all be kept
        ({"policy": "snapkv", "uniform_tokens": 70}, 192),
        ({"policy": "streaming", "sink_tokens": 4}, 128),
        ({"top_p": 1.0, "max_tokens": 40}, 160),
        ({"min_tokens": 4000}, 224),  # no span can be longer than the floor: the tier is full at 128
    ],
    ids=str,
)
def test_no_select_event_while_every_list_is_at_its_floor(options: dict[str, object], first_select: int) -> None:
    assert events_of(OPTIONS.with_options(**options), 2, 300)[0][0] == first_select


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"min_tokens": 300},
        {"policy": "snapkv", "uniform_tokens": 1024},
        {"policy": "rkv", "uniform_tokens": 100, "condense_interval": 512},
        {"policy": "streaming", "sink_tokens": 600},
        {"top_p": 1.0, "max_tokens": None},
        {"min_freed_pages": 0, "min_tokens": 4000},
    ],
    ids=str,
)
@pytest.mark.parametrize("survivors", [1, 2, 4])
def test_a_ring_slot_is_held_for_the_window_of_its_event_only(options: dict[str, object], survivors: int) -> None:
    """Without other requests and pressure: from `query_window` steps before the select event on."""
    options = {"select_interval": 64, "condense_interval": 128, **options}
    planner, pool = make_planner(OPTIONS.with_options(**options)), PagePool(400)
    state = start(planner, pool, 1, 40)
    held, runs, selects = 0, [], 0
    for seq_len in range(40, 1800):
        if state.sparse_span and seq_len == state.selected_at + COUNT_DELAY - 1:
            pages = state.num_condensed_pages + state.sparse_span // PAGE
            planner.settle(state, max(1, pages * survivors), [pages * PAGE * survivors // 4] * 4)
        selects += len(planner.plan([(state, seq_len)], pool).selects)
        if state.ring_slot is None and held:
            runs.append(held)
        held = held + 1 if state.ring_slot is not None else 0
        pool.extend_row(1, seq_len + 1)
    assert runs == [planner.query_window] * selects
    assert held <= planner.query_window


@given(
    st.integers(1, 6), st.integers(0, 6), st.integers(0, 5), st.integers(0, 1000), st.sampled_from([0, 1]),
    st.sampled_from([8, 100, 300, 4000, 5000]),
)  # fmt: skip
def test_the_next_select_event_is_the_first_that_may_drop(
    prefix: int, condensed: int, sparse: int, extra: int, min_freed: int, floor: int
) -> None:
    """Against the rule itself, length by length."""
    options = OPTIONS.with_options(
        select_interval=64, condense_interval=128, min_freed_pages=min_freed, min_tokens=floor, max_tokens=8192
    )
    schedule = make_planner(options).schedule
    end = (prefix + condensed) * PAGE
    state = RequestState(1, prefix * PAGE, end, end + sparse * PAGE, 0)
    seq_len = state.recent_start + extra
    target = schedule.select_target(state, seq_len)
    is_full = target - end + schedule.select_span > schedule.cfg.max_sparse_span
    may_drop = min_freed == 0 or target - state.prefix_end > floor or (floor < 4096 and is_full)
    assert (seq_len >= schedule.next_select(state)) == (
        target - state.recent_start >= schedule.select_span and may_drop
    )


def test_early_events_follow_what_relief_chose() -> None:
    planner, pool = make_planner(OPTIONS.with_options(select_interval=256, condense_interval=256)), PagePool(100)
    state = start(planner, pool, 1, 40)
    for seq_len in range(41, 200):
        pool.extend_row(1, seq_len)
    plan = planner.plan([(state, 180)], pool, EarlyEvents(hurry=True, observes=[(state, 180)]))
    assert plan.observes == [ObserveOp(1, state.ring_slot)]
    assert state.observe_from == 180
    plan = planner.plan([(state, 196)], pool, EarlyEvents(hurry=True, events=[(state, 196)]))
    (select,) = plan.selects
    assert (select.first_query, select.recent_start, plan.early) == (180, 160, 1)
    planner.settle(state, 4, [10] * 4)
    plan = planner.plan([(state, 198)], pool, EarlyEvents(hurry=True, events=[(state, 198)]))
    assert (len(plan.condenses), plan.freed_pages, plan.allocated_pages, plan.early) == (1, 3, 1, 1)
    assert state.early_pages == 2


@pytest.mark.parametrize(
    ("owners", "message"),
    [
        ({"a": [1, 2], "b": [2, 3]}, "token page 2 has 2 owners"),
        ({"a": [1], "b": [3]}, "token page 2 has 0 owners"),
        ({"a": [0, 1, 2, 3]}, "outside 1 .. 3"),
        ({"a": [1, 2, 3, 4]}, "outside 1 .. 3"),
    ],
)
def test_integrity_check_can_fail(owners: dict[str, list[int]], message: str) -> None:
    with pytest.raises(IntegrityError, match=message):
        check_ownership({name: torch.tensor(pages) for name, pages in owners.items()}, 3)


def test_integrity_check_passes() -> None:
    check_ownership({"a": torch.tensor([1, 3]), "b": torch.tensor([2]), "c": torch.tensor([], dtype=torch.int64)}, 3)
