"""Planner, executor and reference attention together, against a float64 memory of every token.

The simulation decodes random queries, keys and values through the real tables and pool, and keeps by itself, per
layer and head, which positions must be attended. Attention and LSE of every step must be those of exactly that set.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import pytest
import torch

from hardkv_sglang.config import HardKVConfig
from hardkv_sglang.events.executor import EventExecutor, SettledCounts
from hardkv_sglang.events.scoring import PooledScorer, TorchScorer
from hardkv_sglang.kernels import bound, publish, reference, reference_publish
from hardkv_sglang.kernels.list_candidates import list_candidates
from hardkv_sglang.kernels.reference_packed import read_lists
from hardkv_sglang.lifecycle.planner import LifecyclePlanner
from hardkv_sglang.lifecycle.request_state import RequestState
from hardkv_sglang.lifecycle.step_plan import SelectOp
from hardkv_sglang.memory_pool.layout import PoolLayout, head_pages_needed
from hardkv_sglang.memory_pool.rank_memory import RankMemory
from hardkv_sglang.memory_pool.resolved_config import ResolvedConfig
from hardkv_sglang.memory_pool.tables import DeviceTables
from hardkv_sglang.selection.policies import make_policy
from hardkv_sglang.selection.top_p import Scored, bound_counts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
L, H, G, D, PAGE, ROW = 2, 2, 3, 16, 32, 1
SCALE = D**-0.5
OPTIONS = HardKVConfig(recent_tokens=32, query_window=16, select_interval=32, condense_interval=64, min_tokens=4)


@pytest.fixture(autouse=True)
def everything_on_the_device() -> Iterator[None]:
    """With a GPU the whole simulation runs there, with the kernels that a server uses."""
    torch.set_default_device(DEVICE)
    yield
    torch.set_default_device("cpu")


@contextmanager
def nothing_waits() -> Iterator[None]:
    """With a GPU, an operation in the block that waits for the device fails."""
    if DEVICE == "cpu":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@dataclass
class Simulation:
    """One request, `lifecycle.PageAllocator` over a small pool, and the oracle's memory."""

    options: HardKVConfig
    seed: int = 0
    priors: torch.Tensor | None = None
    guard: Callable[[], AbstractContextManager[None]] = nothing_waits  # around the work of events
    selects: int = 0
    condenses: int = 0
    events: list[SelectOp] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = torch.Generator(DEVICE).manual_seed(self.seed)
        self.layout = PoolLayout(L, H, D, PAGE, PAGE * 64, self.options.survivor_bits, element_bytes=4)
        self.cfg = ResolvedConfig(self.options, self.layout, H * G, SCALE, 3, 1024)
        self.tables = DeviceTables.allocate(self.cfg, torch.float32, DEVICE)
        self.k, self.v = (torch.full((L, self.layout.num_slots, H, D), math.nan) for _ in range(2))
        # everything unwritten is poison but the padding page, which real servers write dummy tokens to
        self.k[:, :PAGE], self.v[:, :PAGE] = 0, 0
        self.req_to_token = torch.zeros((3, 1024), dtype=torch.int32)
        self.free = torch.randperm(63, generator=self.random) + 1
        self.planner = LifecyclePlanner(self.cfg)
        memory = RankMemory(self.cfg, self.tables, self.k, self.v, self.req_to_token)
        self.executor = EventExecutor(memory, tp_group=None, priors=self.priors)
        self.keys, self.values = (torch.zeros(1024, L, H, D) for _ in range(2))  # by position
        self.attended = torch.zeros((1024, L, H), dtype=torch.bool)
        self.rounded = torch.zeros((1024, L, H), dtype=torch.bool)

    def alloc_pages(self, num_pages: int) -> torch.Tensor | None:
        taken, self.free = self.free[:num_pages], self.free[num_pages:]
        return (taken[:, None] * PAGE + torch.arange(PAGE)).flatten()

    def free_pages(self, slots: torch.Tensor) -> None:
        self.free = torch.cat((self.free, slots[::PAGE] // PAGE))

    def free_row(self, row: int, start: int, end: int) -> None:
        self.free_pages(self.req_to_token[row, start:end].long())

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.random)

    def write_token(self, position: int) -> None:
        if position % PAGE == 0:
            slots = self.alloc_pages(1)
            assert slots is not None
            self.req_to_token[ROW, position : position + PAGE] = slots.int()
        self.keys[position], self.values[position] = self.normal(L, H, D) * 2, self.normal(L, H, D)
        slot = int(self.req_to_token[ROW, position])
        self.k[:, slot], self.v[:, slot] = self.keys[position], self.values[position]
        self.attended[position] = True

    def prefill(self, prompt_len: int) -> RequestState:
        rows = torch.tensor([ROW])
        with self.guard():
            self.executor.reset(rows)
        for position in range(prompt_len):
            self.write_token(position)
        return self.planner.admit(ROW, prompt_len, prompt_len // PAGE * PAGE, prompt_len)

    def step(self, state: RequestState, seq_len: int) -> None:
        """Plan, run events, decode one token in every layer, settle."""
        plan = self.planner.plan([(state, seq_len)], self)
        with self.guard():
            reports = self.executor.run(plan)
        self.condenses += len(plan.condenses)
        for op in plan.selects:
            self.after_select(op)
        for op in plan.condenses:
            self.check_condensed(op.end)
        self.write_token(seq_len)
        for layer in range(L):
            self.decode(layer, seq_len)
        for report in reports:
            counts = SettledCounts.read(report)
            self.planner.settle(state, counts.head_pages, counts.kept_tokens)

    def after_select(self, op: SelectOp) -> None:
        """Sparse tokens that are not listed are no longer attended; listed ones are, also if they were not before."""
        self.selects += 1
        self.events.append(op)
        span = slice(op.condensed_end, op.recent_start)
        self.attended[span] = False
        for layer in range(L):
            for head in range(H):
                count = int(self.tables.num_sparse[layer, ROW, head])
                listed = self.tables.sparse_positions[layer, ROW, head, :count].long()
                assert (listed.diff() > 0).all()
                self.attended[listed, layer, head] = True

    def check_condensed(self, end: int) -> None:
        """Condensed lists hold exactly the survivors, in order: found by their keys, which are all different."""
        for layer in range(L):
            for head in range(H):
                positions = self.positions_held(layer, head, end)
                assert (positions.diff() > 0).all()
                condensed = torch.zeros(end, dtype=torch.bool)
                condensed[positions] = True
                prefix_end = int(self.tables.prefix_end[ROW])
                # a condense event may drop condensed tokens, and must keep all listed sparse ones
                assert not (condensed & ~self.attended[:end, layer, head]).any()
                self.attended[prefix_end:end, layer, head] = condensed[prefix_end:]

    def positions_held(self, layer: int, head: int, end: int) -> torch.Tensor:
        """Of the condensed tokens of a list, which has no sparse ones."""
        if self.layout.survivors.is_packed:
            return self.packed_positions(layer, head, end)
        rows, counts = reference.ragged_rows(self.layout, self.tables, self.req_to_token, layer, ROW)
        held = self.k.view(-1, D)[rows[head, : counts[head]]]
        same = (held[:, None] == self.keys[None, :end, layer, head]).all(-1)
        assert (same.sum(1) == 1).all()
        return same.int().argmax(1)

    def packed_positions(self, layer: int, head: int, end: int) -> torch.Tensor:
        """The same of packed tokens: the nearest, and from then on the memory holds what they were rounded to."""
        count = int(self.tables.num_condensed[layer, ROW, head])
        index = torch.arange(count).expand(1, H, -1)
        held = read_lists(self.k, self.v, self.layout, self.tables, slice(layer, layer + 1), ROW, index)
        keys, values = (x[0, head] for x in held)
        distance = torch.cdist(keys, self.keys[:end, layer, head])
        positions = distance.argmin(1)
        assert (distance.amin(1) < 0.25 * D**0.5).all()
        known = self.rounded[positions, layer, head]
        for memory, rows in ((self.keys, keys), (self.values, values)):
            # rounded once, and never again
            assert torch.equal(memory[positions[known], layer, head], rows[known])
            memory[positions, layer, head] = rows
        self.rounded[positions, layer, head] = True
        return positions

    def decode(self, layer: int, position: int) -> None:
        q, seq_len = self.normal(H * G, D) * 2, position + 1
        slots = reference.dense_slots(self.req_to_token, self.tables, ROW, seq_len)
        state = reference.dense_decode(q, self.k[layer], self.v[layer], slots, SCALE)
        ragged = (self.layout, self.tables, self.req_to_token, layer, ROW, SCALE)
        if int(self.tables.recent_start[ROW]) > 0:
            state = reference.merge_states(state, reference.ragged_decode(q, self.k, self.v, *ragged))
        self.check(q.double(), layer, seq_len, state)
        slot = int(self.tables.ring_slot[ROW])
        if slot >= 0:
            index = position % self.options.query_window
            self.tables.query_ring[layer, slot, index], self.tables.lse2_ring[layer, slot, index] = q, state[1]

    def check(self, q: torch.Tensor, layer: int, seq_len: int, state: reference.State) -> None:
        for head in range(H):
            seen = self.attended[:seq_len, layer, head]
            logits = q[head * G : head * G + G] @ self.keys[:seq_len, layer, head].double()[seen].T * SCALE
            o = logits.softmax(-1) @ self.values[:seq_len, layer, head].double()[seen]
            heads = slice(head * G, head * G + G)
            torch.testing.assert_close(state[0][heads].double(), o, rtol=0, atol=1e-5)
            lse2 = logits.logsumexp(-1) * math.log2(math.e)
            torch.testing.assert_close(state[1][heads].double(), lse2, rtol=0, atol=1e-5)

    def run(self, prompt_len: int, num_tokens: int) -> RequestState:
        state = self.prefill(prompt_len)
        for seq_len in range(prompt_len, prompt_len + num_tokens):
            self.step(state, seq_len)
        return state


@pytest.mark.parametrize("prompt_len", [1, 32, 33])
def test_every_step_attends_what_the_events_kept(prompt_len: int) -> None:
    simulation = Simulation(OPTIONS.with_options(top_p=0.8), seed=prompt_len)
    simulation.run(prompt_len, 230)
    assert simulation.selects >= 4
    assert simulation.condenses >= 2
    assert not simulation.attended[prompt_len : prompt_len + 100].all()


@pytest.mark.parametrize(
    "options",
    [
        {"metric": "snapkv"},
        {"metric": "rkv"},
        {"query_reduction": "union", "budget": "per_head"},
        {"metric": "attention"},
        {"policy": "snapkv", "uniform_tokens": 40},
        {"policy": "rkv", "uniform_tokens": 40},
        {"policy": "streaming"},
        {"max_tokens": 32},
    ],
    ids=str,
)
def test_every_policy_runs_through_the_pool(options: dict[str, object]) -> None:
    simulation = Simulation(OPTIONS.with_options(top_p=0.7, **options))
    state = simulation.run(40, 200)
    assert simulation.condenses >= 1
    if "max_tokens" in options:
        assert max(state.kept_counts) <= 32


@pytest.mark.skipif(DEVICE != "cpu", reason="refused on a GPU")
@pytest.mark.parametrize("options", [{}, {"metric": "rkv"}, {"policy": "streaming"}, {"top_p": 1.0}], ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_packed_survivors_are_attended_as_they_were_rounded(bits: int, options: dict[str, object]) -> None:
    """Lists, attention, LSE and scores of packed tokens, which are quantised once."""
    simulation = Simulation(OPTIONS.with_options(**{"top_p": 0.8, **options}, survivor_bits=bits), seed=bits)
    state = simulation.run(33, 330)
    assert simulation.condenses >= 3
    assert simulation.rounded.any()
    needed = head_pages_needed(simulation.tables.num_condensed[:, ROW], simulation.layout.head_page_tokens).sum()
    assert state.num_condensed_pages == -(-int(needed) // (L * H))
    in_own_slots = -(-(33 + 330) // PAGE) - (state.condensed_end - state.prefix_end) // PAGE
    assert len(simulation.free) == 63 - in_own_slots - state.num_condensed_pages


class CheckedScorer(PooledScorer):
    """Scores in the pool and compares with the definition."""

    def score_layers(self, op: SelectOp, layers: slice) -> Scored:
        tables = self.reader.memory.tables
        remembered = (tables.condensed_energy, tables.dense_energy)
        before = [energy.clone() for energy in remembered]
        pooled = super().score_layers(op, layers)
        after = [energy.clone() for energy in remembered]
        for energy, old in zip(remembered, before, strict=True):
            energy.copy_(old)
        defined = TorchScorer(self.reader).score_layers(op, layers)
        for energy, stored in zip(remembered, after, strict=True):
            torch.testing.assert_close(energy, stored, rtol=1e-2, atol=1e-9)
        self.check_candidates(op, layers)
        assert torch.equal(pooled.valid, defined.valid)
        torch.testing.assert_close(pooled.importance.mean, defined.importance.mean, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(pooled.scores, defined.scores, rtol=1e-3, atol=1e-6)
        return pooled

    def check_candidates(self, op: SelectOp, layers: slice) -> None:
        reader = self.reader
        found = list_candidates(reader.memory, op, layers)
        padding = reader.padding(op, layers)
        valid = reader.exist(found.rows, padding)
        assert torch.equal(found.padding.long(), padding.flatten())
        assert torch.equal(found.valid, valid)
        assert torch.equal(found.attended, reader.attended(op, layers))
        if reader.memory.layout.survivors.is_packed:
            bound = op.condensed_list_bound
            assert torch.equal(found.rows[:, bound:], reader.span_rows(op, layers).flatten(0, 1))
        else:
            assert torch.equal(found.rows[valid], reader.rows(op, layers, padding)[valid])
        assert 0 <= int(found.rows.min()) <= int(found.rows.max()) < len(reader.memory.k_rows)


def checked_bound(
    chosen: torch.Tensor, importance: torch.Tensor, valid: torch.Tensor, floor: int, cap: int | None, unit: int
) -> torch.Tensor:
    """Bounds by kernel and compares with the definition."""
    keep = bound.bound_counts(chosen, importance, valid, floor, cap, unit)
    assert torch.equal(keep, bound_counts(chosen, importance, valid, floor, cap, unit))
    return keep


def checked_publish(tables: DeviceTables, op: SelectOp, keep: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """Publishes by kernel and compares with the definition."""
    expected = DeviceTables(**{name: getattr(tables, name).clone() for name in vars(tables)})
    num_kept = publish.publish(tables, op, keep, temperature)
    assert torch.equal(num_kept, reference_publish.publish(expected, op, keep, temperature))
    listed = torch.arange(tables.sparse_positions.shape[-1]) < tables.num_sparse[..., None]
    for lists in (tables, expected):
        lists.sparse_positions.masked_fill_(~listed, -1)  # behind a list's end there may be anything
    for name in vars(tables):
        assert torch.equal(getattr(tables, name), getattr(expected, name)), name
    return num_kept


@pytest.mark.parametrize(
    "options",
    [
        {},
        *(
            pytest.param(options, marks=pytest.mark.slow)
            for options in ({"metric": "rkv"}, {"metric": "snapkv"}, {"policy": "streaming"}, {"max_tokens": 64})
        ),
        {"budget": "per_head"},
        {"remembered_weight": 0.7, "prior_weight": 0.1, "recent_tokens": 64},
        {"survivor_bits": 4, "remembered_weight": 0.7, "prior_weight": 0.1},
    ],
    ids=str,
)
def test_kernels_agree_with_the_definition(options: dict[str, object]) -> None:
    # to compare means to wait
    simulation = Simulation(OPTIONS.with_options(top_p=0.8, **options), guard=nullcontext)
    executor = simulation.executor
    executor.scorer = CheckedScorer(executor.reader)
    executor.policy = make_policy(simulation.options, PAGE, checked_bound)
    executor.operations = replace(executor.operations, publish=checked_publish)
    simulation.run(33, 230)
    assert simulation.selects >= 4
    assert simulation.condenses >= 2


def test_warm_up_leaves_no_trace() -> None:
    simulation = Simulation(OPTIONS.with_options(top_p=0.8))
    simulation.executor.warm_up()
    tables = simulation.tables
    for lengths in (tables.num_condensed, tables.num_sparse, tables.prefix_end, tables.recent_start):
        assert not lengths.any()
    assert (tables.ring_slot == -1).all()
    assert simulation.k[:, PAGE:].isnan().all()
    simulation.run(33, 150)
    assert simulation.condenses >= 1


def test_p_one_attends_everything() -> None:
    simulation = Simulation(OPTIONS.with_options(top_p=1.0, max_tokens=None, min_freed_pages=0))
    simulation.run(40, 230)
    assert simulation.condenses >= 2
    assert simulation.attended[:270].all()


def test_a_dropped_sparse_token_can_come_back() -> None:
    simulation = Simulation(OPTIONS.with_options(top_p=0.5, min_tokens=0, condense_interval=256))
    state, revived, dropped = simulation.prefill(40), 0, torch.zeros(1024, L, H, dtype=torch.bool)
    for seq_len in range(40, 240):
        simulation.step(state, seq_len)
        span = slice(state.condensed_end, state.recent_start)
        revived += int((dropped[span] & simulation.attended[span]).sum())
        dropped[span] |= ~simulation.attended[span]
    assert revived > 0


def test_priors_serve_the_first_event() -> None:
    priors = torch.tensor([[0.5, 2.0], [1.5, 0.25]])
    simulation = Simulation(OPTIONS.with_options(metric="snapkv", priors="unread.json"), priors=priors)
    state = simulation.prefill(40)
    for seq_len in range(40, 140):
        simulation.step(state, seq_len)
    assert simulation.selects == 1
    assert not simulation.events[0].recalibrate
    assert torch.equal(simulation.tables.temperature[:, ROW], priors)
