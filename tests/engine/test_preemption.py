"""Preemption through SGLang's own `PrefillAdder`, requests, allocator and radix tree, without a server.

Runs in a process of its own, because hooks and published arguments last as long as a process.
"""

from __future__ import annotations

import pytest
from engine.script import run_script

SCRIPT = """
import sys
from array import array
from inspect import signature
from types import SimpleNamespace
import torch
import sglang.srt.managers.scheduler
import sglang_objects as stock
from sglang.srt.managers.schedule_batch import release_req
from sglang.srt.managers.schedule_policy import AddReqResult, PrefillAdder
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.plugins import load_plugins
from sglang.srt.runtime_context import publish
from sglang.srt.server_args import ServerArgs
from hardkv_sglang.config import HardKVConfig
from hardkv_sglang.engine import compat
from hardkv_sglang.engine.assembly import Attachment
from hardkv_sglang.engine.hooks import RUNTIME_HOOKS
from hardkv_sglang.engine.installation import install
from hardkv_sglang.engine.runtime import HardKVRuntime
from hardkv_sglang.memory_pool.layout import PoolLayout
from hardkv_sglang.memory_pool.resolved_config import ResolvedConfig

PAGE, TOKENS, MOST, PROMPT = 32, 131072, 16384, 512
has_tree = sys.argv[1] == "tree"
server_args = ServerArgs(model_path="dummy")
publish(server_args, role="test")
# up to 0.5.18 preemption is told the flags
args = [server_args] if "server_args" in signature(PrefillAdder.preempt_to_schedule).parameters else []
load_plugins()


class Batch(SimpleNamespace):
    # the fields and methods that preemption uses of a ScheduleBatch; releasing is SGLang's own

    def release_req(self, index, remaining, *server_args):
        req = self.reqs[index]
        thrown.append(req)
        release_req(
            req=req, remaing_req_count=remaining, req_to_token_pool=rows, token_to_kv_pool_allocator=allocator,
            tree_cache=cache, hisparse_coordinator=None, **{"server_args": args for args in server_args},
        )

    def filter_batch(self, keep_indices):
        self.reqs = [self.reqs[i] for i in keep_indices]


def request(index, num_prompt=PROMPT, priority=0, most=MOST, base=None):
    start = (index if base is None else base) * 100_000
    ids = array("q", range(start, start + num_prompt))
    if base is not None:  # the first half is shared
        ids[num_prompt // 2 :] = array("q", range(index * 100_000, index * 100_000 + num_prompt - num_prompt // 2))
    req = stock.make_request(str(index), ids, most, priority=priority)
    req.time_stats.wait_queue_entry_time = float(index)
    return req


def run(req, num_output):
    # as after prefill and `num_output` decode steps
    rows.alloc([req])
    req.init_next_round_input(cache)
    stock.lock(cache, req)
    prompt, total = len(req.origin_input_ids), len(req.origin_input_ids) + num_output
    cached = stock.cached_slots(cache, req)
    slots = torch.cat((cached, allocator.alloc(-(-total // PAGE) * PAGE - len(cached))))
    rows.req_to_token[compat.row_of(req), : len(slots)] = slots.to(torch.int32)
    stock.set_prefill(req, len(cached), prompt)
    stock.hold(req, prompt)
    stock.stock_cache_unfinished(req, cache)
    stock.hold(req, total)
    req.output_ids = array("q", range(num_output + 1))
    states[req] = planner.admit(compat.row_of(req), prompt, compat.protected_len(req), total)
    return req


def compress(req, num_pages):
    # everything behind the prefix but the recent window is condensed into `num_pages`
    state, pages = states[req], compat.SglangPageAllocator(cache, allocator, rows.req_to_token)
    end = (compat.committed_len(req) - 128) // PAGE * PAGE
    pages.free_row(state.row, state.condensed_end, end)
    state.condensed_slots, state.num_condensed_pages = pages.alloc_pages(num_pages), num_pages
    state.condensed_end = state.recent_start = end
    state.num_selects = state.num_condenses = 1
    state.selected_at = compat.committed_len(req)
    planner.table.write(state)


def server(num_running, num_output, num_pages, base=None, most=MOST):
    global rows, allocator, cache, planner, states, runtime, thrown
    rows = ReqToTokenPool(size=64, max_context_len=20480, device="cpu", enable_memory_saver=False)
    allocator = stock.make_allocator(TOKENS, PAGE)
    cache = stock.make_cache(has_tree, rows, allocator, PAGE)
    cfg = ResolvedConfig(HardKVConfig(), PoolLayout(2, 2, 64, PAGE, TOKENS + PAGE), 4, 0.125, 65, 20480)
    memory = SimpleNamespace(cfg=cfg, req_to_token=rows.req_to_token)
    runtime = HardKVRuntime(SimpleNamespace(memory=memory, tp_group=None), backend=None)
    planner, states, thrown = runtime.planner, runtime.states, []
    hardkv.attached = runtime
    for age in range(1, 33):
        for _ in range(50):
            planner.kept.add(age * 80, age * 512)
    running = []
    for i in range(num_running):
        running.append(run(request(i, base=base, most=most), num_output))
        compress(running[-1], num_pages)
    return running


def adder(running):
    batch = Batch(reqs=list(running), batch_is_full=True)
    return PrefillAdder(PAGE, cache, allocator, batch, 0.7, 16384, 2048)


def free():
    return allocator.available_size() + cache.evictable_size()


hardkv = Attachment(HardKVConfig())

# what SGLang itself would do
running, thrown_by_stock = server(32, 8192, 40), []
batch = adder(running)
batch.running_batch.release_req = lambda index, *_: thrown_by_stock.append(index)
newcomer = request(99, priority=100)
newcomer.init_next_round_input(cache)
assert batch.preempt_to_schedule(newcomer, *args)
assert len(thrown_by_stock) >= 8, thrown_by_stock

# in a tuple: a hook also replaces the function under every name that a module has for it, this one included
stock_functions = (PrefillAdder.preempt_to_schedule,)
install(RUNTIME_HOOKS, hardkv)

# one newcomer takes the place of one: its memory is there
running = server(32, 8192, 40)
assert free() > 10_000
batch, newcomer = adder(running), request(99, priority=100)
assert batch.preempt_to_schedule(newcomer, *args)
assert thrown == batch.preempt_list == [running[-1]]
assert stock.reserved_tokens(batch) == 0
assert len(batch.running_batch.reqs) == 31 and not batch.running_batch.batch_is_full
newcomer.init_next_round_input(cache)
assert batch.add_one_req(newcomer, False, None) == AddReqResult.CONTINUE
assert batch.can_run_list == [newcomer]
assert not runtime.preemption.end_pass() == [] and runtime.preemption.end_pass() == []

# nobody has a lower priority, or everybody's memory would not do: nobody is released
running = server(32, 8192, 40)
assert not adder(running).preempt_to_schedule(request(99, priority=0), *args)
for req in running[1:]:
    req.priority = 100
allocator.alloc(allocator.available_size() - 64 * PAGE)
assert not adder(running).preempt_to_schedule(request(99, 14000, priority=100), *args)
assert not thrown and len(states) == 32

# the pool is full: as many as give back what it needs, and the estimate of what they give back is exact
for base in (None, 7):
    running = server(24, 8192, 40, base=base, most=8256)
    filler = allocator.alloc(allocator.available_size() - 64 * PAGE)
    batch, newcomer = adder(running), request(99, 9000, priority=100, most=64)
    newcomer.init_next_round_input(cache)
    candidates = compat.preemptible(stock_functions[0], batch, newcomer, *args)
    assert candidates == running[::-1] and not thrown
    chosen = runtime.preemption.choose(batch, newcomer, candidates)
    assert 1 < len(chosen) < 24, len(chosen)
    fits = runtime.preemption._fits_without
    assert fits(batch, newcomer, chosen) and not fits(batch, newcomer, chosen[:-1])
    own = sum(runtime.preemption._own_tokens(r) for r in chosen)
    room = own + compat.room_for(batch, newcomer, chosen)
    assert batch.preempt_to_schedule(newcomer, *args)
    assert set(thrown) == set(chosen)
    # in the order in which they came, on every rank
    assert batch.preempt_list == chosen[::-1]
    assert compat.room_for(batch, newcomer) == room, (compat.room_for(batch, newcomer), room)
    newcomer.init_next_round_input(cache)
    batch.add_one_req(newcomer, False, None)
    assert batch.can_run_list == [newcomer]

# requests that have ended, but are still in the batch, hold nothing and are not preempted
running = server(8, 1024, 20)
ended = running[-1]
ended.finished_reason = SimpleNamespace()
batch = adder(running)
assert batch.preempt_to_schedule(request(99, priority=100), *args)
assert thrown == [running[-2]]
print("ok", len(thrown_by_stock))
"""


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["tree", "none"])
def test_preemption_by_footprint(cache: str) -> None:
    run_script(SCRIPT, cache)
