"""What SGLang relies on at our hooks, driven on its own request, tree, allocator and checker classes.

`test_contracts.py` runs this file in a process of its own, because what is published lasts as long as a process.
"""

from __future__ import annotations

import itertools
import json
import logging
import sys
import traceback
from array import array
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import sglang_objects as stock
import torch
from sglang.srt.managers.schedule_batch import FINISH_LENGTH, Req
from sglang.srt.managers.schedule_policy import PrefillAdder
from sglang.srt.managers.scheduler_components.invariant_checker import SchedulerInvariantChecker
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.runtime_context import publish
from sglang.srt.server_args import ServerArgs

from hardkv_sglang.config import HardKVConfig
from hardkv_sglang.engine import compat, hooks
from hardkv_sglang.engine.compat import committed_len, protected_len, row_of, tree_slots
from hardkv_sglang.engine.runtime import HardKVRuntime
from hardkv_sglang.lifecycle.request_state import RequestState
from hardkv_sglang.memory_pool.integrity import IntegrityError, check_ownership
from hardkv_sglang.memory_pool.layout import PoolLayout
from hardkv_sglang.memory_pool.resolved_config import ResolvedConfig
from hardkv_sglang.memory_pool.tables import DeviceTables

PAGE, NUM_PAGES, MAX_LEN = 32, 64, 1024
SURVIVOR_PAGES = 1
OPTIONS = HardKVConfig(
    recent_tokens=32, query_window=16, select_interval=32, condense_interval=64, min_tokens=8, top_p=0.8,
    request_reports=8,
)  # fmt: skip
DENSE = {"kv_compression": "none"}


class World:
    """One rank without a model: SGLang's tree, rows and allocator, and our runtime over them."""

    def __init__(self, has_tree: bool = True, options: HardKVConfig = OPTIONS) -> None:
        self.rows = ReqToTokenPool(size=8, max_context_len=MAX_LEN, device="cpu", enable_memory_saver=False)
        self.allocator = stock.make_allocator(NUM_PAGES * PAGE, PAGE)
        self.tree = stock.make_cache(has_tree, self.rows, self.allocator, PAGE)
        layout = PoolLayout(num_layers=2, num_kv_heads=2, head_dim=64, page_size=PAGE, num_slots=(NUM_PAGES + 1) * PAGE)
        cfg = ResolvedConfig(options, layout, 4, 0.125, self.rows.req_to_token.shape[0], MAX_LEN)
        tables = DeviceTables.allocate(cfg, torch.float32, torch.device("cpu"))
        memory = SimpleNamespace(
            cfg=cfg, layout=layout, tables=tables, req_to_token=self.rows.req_to_token, k_storage=torch.empty(0)
        )
        backend: Any = SimpleNamespace(workspace_bytes=0)
        executor: Any = SimpleNamespace(memory=memory, tp_group=None)
        self.runtime = HardKVRuntime(executor, backend)
        self.hardkv: Any = SimpleNamespace(runtime=self.runtime)
        self.running: list[Req] = []

    def request(self, rid: str, prompt: Sequence[int], output: Sequence[int] = (), custom_params: Any = None) -> Req:
        req = stock.make_request(rid, prompt, 500, custom_params=custom_params)
        req.output_ids = array("q", output)
        return req

    def leave_in_tree(self, tokens: Sequence[int]) -> None:
        """Whole pages of a request that has ended without an event."""
        key = RadixKey(array("q", tokens), None).page_aligned(PAGE)
        matched = stock.matched_slots(self.tree, key)
        fresh = self.allocator.alloc(len(key) - len(matched))
        self.tree.insert(InsertParams(key=key, value=torch.cat((matched, fresh)), prev_prefix_len=len(matched)))

    def prefill(self, req: Req, chunk: int = MAX_LEN) -> None:
        """As the scheduler does: match, lock, allocate, and hand every chunk to the tree through our hook."""
        req.init_next_round_input(self.tree)
        adder = PrefillAdder(PAGE, self.tree, self.allocator, SimpleNamespace(reqs=[]), 0.7, 16384, 8192)
        adder.add_one_req(req, False, None)
        assert adder.can_run_list == [req]
        self.rows.alloc([req])
        row, total = self.rows.req_to_token[row_of(req)], compat.num_tokens(req)
        cached = stock.cached_slots(self.tree, req)
        row[: len(cached)] = cached.int()
        while True:
            start = compat.cached_len(req)
            end = min(total, start + chunk)
            self.extend_row(req, start, end)
            stock.set_prefill(req, start, end)
            protected = protected_len(req)
            hooks.around_maybe_cache_unfinished_req(
                self.hardkv, stock.stock_cache_unfinished, req, self.tree, chunked=end < total
            )
            assert protected_len(req) >= protected, "pages that the request reads are no longer locked for it"
            assert stock.prefill_of(req) == end
            assert compat.cached_len(req) == end, "the next chunk would start elsewhere"
            if hasattr(req, "prefix_indices"):
                assert req.prefix_indices.tolist() == row[:end].tolist()
            if end == total:
                break
        self.running.append(req)

    def extend_row(self, req: Req, start: int, end: int) -> None:
        """Slots for positions `[start, end)`."""
        row = self.rows.req_to_token[row_of(req)]
        first = -(-start // PAGE) * PAGE
        if start < first:
            row[start : min(first, end)] = row[start - 1] + 1 + torch.arange(min(first, end) - start, dtype=torch.int32)
        if end > first:
            slots = self.allocator.alloc(-(-(end - first) // PAGE) * PAGE)
            assert slots is not None
            row[first:end] = slots[: end - first].int()
        stock.hold(req, end)

    def decode(self, num_steps: int) -> None:
        """Steps of everything that runs, through the planning hook; counts of select events arrive at once."""
        for _ in range(num_steps):
            batch: Any = SimpleNamespace(reqs=self.running, tree_cache=self.tree, batch_is_full=True)
            hooks.before_prepare_for_decode(self.hardkv, batch)
            plans, self.runtime.pending = self.runtime.pending, []
            for plan in plans:
                for select in plan.selects:
                    self.runtime.planner.settle(select.state, 4 * SURVIVOR_PAGES, [PAGE] * 4)
                for condense in plan.condenses:
                    pages = condense.slots[::PAGE] // PAGE
                    tables = self.runtime.audit.memory.tables
                    tables.num_condensed[:, condense.row] = SURVIVOR_PAGES * PAGE
                    tables.condensed_pages[condense.row, : len(pages)] = pages.int()
                assert batch.batch_is_full is (plan.freed_pages == 0)
            for req in self.running:
                self.extend_row(req, committed_len(req), committed_len(req) + 1)
                req.output_ids.append(7)

    def release(self, req: Req, is_insert: bool = True) -> None:
        """As the end, an abort or a retraction (`is_insert` false) of a request."""
        self.running.remove(req)
        req.finished_reason = FINISH_LENGTH(len(req.output_ids)) if is_insert else None
        hooks.before_release_kv_cache(self.hardkv, req, self.tree, is_insert)
        stock.stock_release(req, self.tree, is_insert)

    def retract(self, req: Req) -> None:
        self.release(req, is_insert=False)
        req.reset_for_retract()

    def pages_of(self, req: Req) -> set[int]:
        """Token pages of the positions that the request attends in place."""
        row, state = self.rows.req_to_token[row_of(req)], self.runtime.states.get(req)
        slots = row[: committed_len(req)]
        if state is not None:
            slots = torch.cat((row[: state.prefix_end], row[state.condensed_end : committed_len(req)]))
        return set((slots // PAGE).tolist())

    def free_pages(self) -> set[int]:
        return set(compat.free_pages(self.allocator).tolist())

    def check(self) -> None:
        """Every page has one owner, and no eviction can take a page from a running request."""
        self.runtime.check_integrity(self.running, self.tree)
        self.tree.evict(EvictParams(num_tokens=NUM_PAGES * PAGE))
        for req in self.running:
            assert not self.pages_of(req) & self.free_pages(), "a page that a running request attends was given away"
        self.runtime.check_integrity(self.running, self.tree)

    def checker(self) -> SchedulerInvariantChecker:
        """SGLang's own memory check of this rank."""
        batch = SimpleNamespace(reqs=self.running, is_empty=lambda: not self.running)
        stats = SimpleNamespace(
            get_pool_stats=lambda: SimpleNamespace(
                full_available_size=self.allocator.available_size(), full_evictable_size=self.tree.evictable_size()
            ),
            session_held_tokens=lambda: 0,
            session_held_req_count=lambda: 0,
        )
        return stock.make_checker(
            page_size=PAGE, max_total_num_tokens=NUM_PAGES * PAGE, tree_cache=self.tree,
            token_to_kv_pool_allocator=self.allocator, req_to_token_pool=self.rows, pool_stats_observer=stats,
            get_last_batch=lambda: batch, get_running_batch=lambda: batch,
        )  # fmt: skip


def prompt_and_output(prompt_len: int) -> tuple[list[int], list[int]]:
    return list(range(1000, 1000 + prompt_len)), list(range(2000, 2300))


def retracted_request_keeps_what_the_tree_owned() -> None:
    """maybe_cache_unfinished_req: protected lengths never fall, locks cover what is read, indices are the row's."""
    for prompt_len, in_tree, chunk, custom in itertools.product(
        (31, 32, 33, 40, 63), (0, 32, 64, 96, 224), (32, 96, MAX_LEN), (None, DENSE)
    ):
        world = World()
        prompt, output = prompt_and_output(prompt_len)
        world.leave_in_tree((prompt + output)[:in_tree])
        other, req = world.request("twin", prompt, output[:20]), world.request("twin", prompt, output, custom)
        world.prefill(other)
        req.retracted_stain = True
        world.prefill(req, chunk)
        if custom is None:
            limit = max(prompt_len, protected_len(req))
            assert protected_len(req) <= max(limit, in_tree), "the tree owns output that could be compressed"
        world.check()
        for victim in (req, other):
            world.decode(130)
            world.check()
            assert (victim in world.runtime.states) is (victim is other or custom is None)
            world.release(victim)
            world.check()
        assert not world.runtime.states


def release_leaves_exact_kv_only() -> None:
    """release_kv_cache: committed and allocated lengths are equal, and what is left is the dense prefix."""
    for prompt_len, has_tree, is_insert in itertools.product((1, 31, 33, 64), (True, False), (True, False)):
        world = World(has_tree)
        prompt, output = prompt_and_output(prompt_len)
        req = world.request("a", prompt, output[:1])
        world.prefill(req)
        world.decode(300)
        state = world.runtime.states[req]
        assert state.num_condenses >= 2
        world.release(req, is_insert)
        assert state.released
        assert len(tree_slots(world.tree)) <= state.prefix_end, "approximate KV entered the tree"
        check_ownership(
            {"free": torch.tensor(sorted(world.free_pages())), "tree": tree_slots(world.tree)[::PAGE] // PAGE},
            NUM_PAGES,
        )
        assert len(world.runtime.planner.free_ring_slots) == world.runtime.cfg.num_ring_slots


def planning_keeps_what_the_step_reads() -> None:
    """prepare_for_decode: lengths are SGLang's; prefix, window and the page of the next token keep their slots."""
    world = World()
    prompt, output = prompt_and_output(40)
    req = world.request("a", prompt, output[:1])
    world.prefill(req)
    for _ in range(300):
        seq_len, protected = committed_len(req), protected_len(req)
        row = world.rows.req_to_token[row_of(req), :seq_len].clone()
        world.decode(1)
        assert committed_len(req) == req.kv.kv_allocated_len == seq_len + 1
        assert protected_len(req) == protected
        state = world.runtime.states[req]
        assert state.recent_start <= max(state.prefix_end, seq_len - OPTIONS.recent_tokens)
        attended = torch.cat((row[: state.prefix_end], row[state.condensed_end :]))
        assert not set((attended // PAGE).tolist()) & world.free_pages()
    assert state.num_condenses >= 2
    world.check()


def twins_with_one_id_are_two_requests() -> None:
    """Every hook: two tokenizer workers may hand over requests of the same id at the same time."""
    assert Req.__eq__ is object.__eq__
    assert Req.__hash__ is object.__hash__, "runtime states are keyed by the request object"
    seen = []
    for rids in (("a", "b"), ("same", "same")):
        world = World()
        reqs = [
            world.request(rid, list(range(1000 * i, 1000 * i + 40 + 7 * i)), [1]) for i, rid in enumerate(rids, start=1)
        ]
        world.prefill(reqs[0])
        world.decode(100)
        world.prefill(reqs[1])
        world.decode(150)
        sizes = hooks.after_get_total_uncached_sizes(
            world.hardkv, SchedulerInvariantChecker._get_total_uncached_sizes(world.checker()), world.checker()
        )
        world.check()
        states = [world.runtime.states[req] for req in reqs]
        world.release(reqs[1])
        assert not states[0].released
        assert states[1].released
        world.decode(100)
        world.check()
        world.release(reqs[0])
        world.check()
        seen.append((sizes, [summary(s) for s in states]))
    assert seen[0] == seen[1]


def summary(state: RequestState) -> tuple[int, ...]:
    return state.row, state.condensed_end, state.recent_start, state.num_selects, state.num_condenses


def strict_check_counts_compressed_requests() -> None:
    """_get_total_uncached_sizes, self_check_during_busy: SGLang's own sum is the pool at every step."""
    count = SchedulerInvariantChecker._get_total_uncached_sizes
    for has_tree in (True, False):
        world, differs = World(has_tree), 0
        for i in range(3):
            world.prefill(world.request("same", list(range(1000 * i, 1000 * i + 33 + i)), [1]))
        for _ in range(120):
            world.decode(2)
            checker = world.checker()
            uncached, _ = hooks.after_get_total_uncached_sizes(world.hardkv, count(checker), checker)
            leak, message = checker._check_full_pool(checker.pool_stats_observer.get_pool_stats(), uncached)
            assert not leak, message
            differs += uncached != count(checker)[0]
            hooks.after_self_check_during_busy(world.hardkv, None, checker)
        assert differs > 50, "nothing was compressed"


def idle_check_survives_deep_trees() -> None:
    """_check_req_pool: a conversation of two thousand turns is a path of two thousand nodes."""
    from sglang.srt.environ import envs

    world = World()
    tokens, values = list(range(2000)), torch.arange(PAGE, PAGE + 2000)
    world.tree = stock.make_cache(True, world.rows, world.allocator, page_size=1)
    for end in range(1, 2001):
        key = RadixKey(array("q", tokens[:end]), None)
        world.tree.insert(InsertParams(key=key, value=values[:end], prev_prefix_len=end - 1))
    assert sorted(tree_slots(world.tree).tolist()) == values.tolist()
    with envs.SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY.override(1):
        world.runtime.idle_check_due = True
        expect(IntegrityError, lambda: hooks.after_check_req_pool(world.hardkv, None, world.checker()))


def idle_check_ends_the_server_in_strict_mode_only() -> None:
    """_check_req_pool: an idle server without strict checks logs what is left over, and serves on."""
    from sglang.srt.environ import envs

    for is_strict in (False, True):
        world = World()
        prompt, output = prompt_and_output(40)
        req = world.request("lost", prompt, output[:1])
        world.prefill(req)
        world.decode(90)
        # as if a path of SGLang's had ended the request without release_kv_cache
        world.running.clear()
        check: Callable[[], object] = lambda world=world: hooks.after_check_req_pool(  # noqa: E731
            world.hardkv, None, world.checker()
        )
        with envs.SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY.override(int(is_strict)):
            if is_strict:
                expect(IntegrityError, check)
                continue
            check()
        assert not world.runtime.states
        assert len(world.runtime.planner.free_ring_slots) == world.runtime.cfg.num_ring_slots


def expect(error: type[Exception], call: Callable[[], object]) -> None:
    try:
        call()
    except error:
        return
    raise AssertionError(f"{error.__name__} was not raised")


def a_refusal_is_queued_as_sglang_queues_its_own() -> None:
    """_add_request_to_queue: a refused request is one token long and asks for no log-probabilities; a request that
    SGLang has refused keeps its reason."""
    from sglang.srt.runtime_context import get_parallel

    world = World()
    prompt, _ = prompt_and_output(40)
    with get_parallel().override(tp_rank=0):
        for params, is_refused in (
            ([1], False),
            (DENSE, False),
            ({"kv_compression": 1}, True),
            ({"kv_compresion": 1}, True),
        ):
            req = world.request("a", prompt, custom_params=params)
            req.return_logprob, req.logprob_start_len = True, 3
            hooks.before_add_request_to_queue(world.hardkv, None, req)
            assert (req.to_finish is not None) is is_refused
            if is_refused:
                assert len(req.origin_input_ids) == 1
                assert (req.return_logprob, req.logprob_start_len) == (False, -1)
                assert "kv_compression" in req.to_finish.message
            req.set_finish_with_abort("first")
            hooks.before_add_request_to_queue(world.hardkv, None, req)
            assert req.to_finish.message == "first"


def what_could_never_start_is_refused() -> None:
    """_add_request_to_queue: SGLang refuses nothing after this, and its adder would turn the request down for ever."""
    from sglang.srt.runtime_context import get_parallel

    pool_tokens = NUM_PAGES * PAGE
    lengths = (pool_tokens - 2 * PAGE, pool_tokens - PAGE - 1, pool_tokens - PAGE, pool_tokens - 1)
    for cached_pages, length in itertools.product((0, 3), lengths):
        world, prompt = World(), list(range(length))
        world.leave_in_tree(prompt[: cached_pages * PAGE])
        req = world.request("a", prompt)
        req.init_next_round_input(world.tree)
        adder = PrefillAdder(PAGE, world.tree, world.allocator, SimpleNamespace(reqs=[]), 0.7, 16384, 8192)
        with compat.without_output_reservation():
            adder.add_one_req(req, False, None)
        never = not adder.can_run_list
        with get_parallel().override(tp_rank=0):
            hooks.before_add_request_to_queue(world.hardkv, None, req)
        assert never is (length >= pool_tokens - PAGE)
        assert (req.to_finish is not None) is never
        assert not never or f"{length} tokens" in req.to_finish.message


def finished_requests_are_sums_unless_asked_for() -> None:
    """get_internal_state: by default nobody's id or length is shown; ids in reports have a bounded length. A retracted
    request has not ended."""
    prompt, output = prompt_and_output(40)
    for num_reports in (0, 2):
        world = World(options=OPTIONS.with_options(request_reports=num_reports))
        rids = ["secret-1", "secret-2", "secret-3" + "x" * 1_000_000]
        for rid in rids:
            req = world.request(rid, prompt, output[:1])
            for ends in (False, True):
                world.prefill(req)
                world.decode(100)
                world.release(req) if ends else world.retract(req)
        answer: Any = SimpleNamespace(internal_state={})
        hooks.after_get_internal_state(world.hardkv, answer, None, None)
        block = answer.internal_state["hardkv"]
        text = json.dumps(block)
        assert len(block["requests"]) == num_reports
        assert len(text) < 10_000
        assert [rid[:8] in text for rid in rids] == [False, num_reports > 0, num_reports > 0]
        assert (block["finished"]["requests"], block["finished"]["decoded_tokens"]) == (3, 3 * 200)
        assert 0 < block["finished"]["held_pages"] < block["finished"]["dense_pages"]


def shared_prefixes_are_named_or_missed_aloud() -> None:
    world, heard = World(), []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    logging.getLogger("hardkv_sglang").addHandler(handler)
    system = range(100, 100 + 2 * PAGE)
    first, second = (world.request(name, [*system, *tail]) for name, tail in (("a", range(40)), ("b", range(50, 90))))
    world.prefill(first)
    world.prefill(second)
    for _ in range(2):
        ours, theirs = compat.prefix_paths([first, second], world.tree)
    core = getattr(world.tree, "tree_core", None)
    if type(core).__name__ == "RustUnifiedTreeCore" and not hasattr(core, "collect_path_info"):  # 0.5.21
        (warning,) = heard
        assert "SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND=python" in warning and not theirs
        return
    assert not heard
    assert [end for node, end in ours if (node, end) in theirs] == [2 * PAGE]
    assert [end for _, end in ours] == [end for _, end in theirs] == [2 * PAGE, 3 * PAGE]


CASES = (
    retracted_request_keeps_what_the_tree_owned,
    release_leaves_exact_kv_only,
    planning_keeps_what_the_step_reads,
    twins_with_one_id_are_two_requests,
    strict_check_counts_compressed_requests,
    idle_check_survives_deep_trees,
    idle_check_ends_the_server_in_strict_mode_only,
    a_refusal_is_queued_as_sglang_queues_its_own,
    what_could_never_start_is_refused,
    finished_requests_are_sums_unless_asked_for,
    shared_prefixes_are_named_or_missed_aloud,
)


def failure(case: Callable[[], None]) -> str | None:
    try:
        case()
    except (AssertionError, IntegrityError, RuntimeError, ValueError, AttributeError, TypeError, KeyError):
        return traceback.format_exc()
    return None


if __name__ == "__main__":
    publish(ServerArgs(model_path="dummy"), role="test")
    chosen = [case for case in CASES if not sys.argv[1:] or case.__name__ in sys.argv[1:]]
    print(json.dumps({case.__name__: failure(case) for case in chosen}))
