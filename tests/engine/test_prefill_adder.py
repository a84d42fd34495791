"""Admission through SGLang's own `PrefillAdder`, requests, allocator and caches, without a server.

Runs in a process of its own, because patches and published arguments last as long as a process.
"""

from __future__ import annotations

import pytest
from engine.script import run_script

pytestmark = pytest.mark.slow

SCRIPT = """
import sys
from array import array
from types import SimpleNamespace
import torch
from sglang.srt.managers import schedule_policy
import sglang_objects as stock
from sglang.srt.managers.schedule_policy import AddReqResult, PrefillAdder
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.runtime_context import publish
from sglang.srt.server_args import ServerArgs
from hardkv_sglang.engine.admission import Admission
from hardkv_sglang.config import HardKVConfig
from hardkv_sglang.memory_pool.resolved_config import ResolvedConfig
from hardkv_sglang.engine.admission_hooks import after_prefill_adder_init, around_add_chunked_req, around_add_one_req
from hardkv_sglang.engine.preemption import Preemption
from hardkv_sglang.lifecycle.planner import LifecyclePlanner
from hardkv_sglang.memory_pool.layout import PoolLayout
from hardkv_sglang.engine import compat
from hardkv_sglang.lifecycle.relief import PressureRelief

PAGE, TOKENS, MOST = 32, 6016, 3000
has_tree = sys.argv[1] == "tree"
publish(ServerArgs(model_path="dummy"), role="test")
rows = ReqToTokenPool(size=64, max_context_len=8192, device="cpu", enable_memory_saver=False)
allocator = stock.make_allocator(TOKENS, PAGE)
cache = stock.make_cache(has_tree, rows, allocator, PAGE)
planner = LifecyclePlanner(ResolvedConfig(
    HardKVConfig(select_interval=512), PoolLayout(2, 2, 64, PAGE, TOKENS + PAGE), 4, 0.125, 65, 8192))
states = {}
admission = Admission(planner, PressureRelief(planner), states)
hardkv = SimpleNamespace(runtime=SimpleNamespace(
    admission=admission, preemption=Preemption(admission, states, PAGE)))

def request(index, num_prompt=40, ignore_eos=True):
    req = stock.make_request(str(index), range(index * 100, index * 100 + num_prompt), MOST, ignore_eos)
    req.init_next_round_input(cache)
    return req

def adder(running):
    return PrefillAdder(PAGE, cache, allocator, SimpleNamespace(reqs=running), 0.7, 16384, 2048)

def our_adder(running):
    batch = adder(running)
    after_prefill_adder_init(hardkv, None, batch)
    return batch

def admit(add, batch, reqs):
    for number, req in enumerate(reqs):
        if add(batch, req) != AddReqResult.CONTINUE:
            return number
    return len(reqs)

def stocks(batch, req):
    return PrefillAdder.add_one_req(batch, req, False, None)

def ours(batch, req):
    return around_add_one_req(hardkv, PrefillAdder.add_one_req, batch, req, False, None)

requests = [request(i) for i in range(16)]
few, many = admit(stocks, adder([]), requests), admit(ours, our_adder([]), [request(i) for i in range(16, 32)])
# dense they need 3040 tokens each; compressed 40 + 672 dense ones and at most 0.7 * 2400 condensed ones at the end
assert few == 1, few
assert many == 2, many
for age in range(1, 6):
    for _ in range(50):
        planner.kept.add(age * 51, age * 512)
batch = our_adder([])
more = admit(ours, batch, [request(i) for i in range(32, 48)])
assert more >= 5, more
assert len(batch.can_run_list) == more

# what we change for the length of a call is as it was
assert schedule_policy.CLIP_MAX_NEW_TOKENS == 4096
assert all(r.sampling_params.ignore_eos for r in batch.can_run_list)

# requests that run are counted without SGLang's reservation for them
running = batch.can_run_list
rows.alloc(running)
for req in running:
    slots = allocator.alloc(2 * PAGE)
    stock.hold(req, 40)
    states[req] = planner.admit(compat.row_of(req), 40, 32, 40)
assert stock.reserved_tokens(adder(running)) >= len(running) * MOST * 0.7
batch = our_adder(running)
assert stock.reserved_tokens(batch) == 0
assert ours(batch, request(50)) == AddReqResult.NO_TOKEN
assert stock.reserved_tokens(batch) == 0
# all running requests have ended but one
batch = our_adder(running[:1])
assert ours(batch, request(51, ignore_eos=False)) == AddReqResult.CONTINUE
assert stock.reserved_tokens(batch) <= 3 * PAGE

# a chunk of a long prompt is a whole one, where stock, which would rather keep room for outputs, takes a few tokens
free = allocator.available_size() + cache.evictable_size()
for req in running:  # since 0.5.21 or so a fixed length is not scaled by the ratio
    req.sampling_params.ignore_eos = False
ratio = (free - 5.5) / (len(running) * MOST)
for is_ours, length in ((False, 5), (True, 2048)):
    batch = PrefillAdder(PAGE, cache, allocator, SimpleNamespace(reqs=running), ratio, 16384, 2048)
    req = request(60, 3000)
    if is_ours:
        after_prefill_adder_init(hardkv, None, batch)
        assert around_add_chunked_req(hardkv, PrefillAdder.add_chunked_req, batch, req) is req
    else:
        batch.add_chunked_req(req)
    assert stock.prefill_of(req) - compat.cached_len(req) == length, stock.prefill_of(req)
# and the last chunk sets nothing aside for the output, which would keep others out
batch = our_adder(running)
assert around_add_chunked_req(hardkv, PrefillAdder.add_chunked_req, batch, request(61, 1000)) is None
assert stock.reserved_tokens(batch) == 1024 + PAGE
print("ok", few, many, more)
"""


@pytest.mark.parametrize("cache", ["tree", "none"])
def test_admission_by_footprint(cache: str) -> None:
    run_script(SCRIPT, cache)
