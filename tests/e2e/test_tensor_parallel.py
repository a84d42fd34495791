"""Tensor parallelism: ranks keep different tokens and must decide alike.

Without a GPU three ranks, each with one KV head of the demo model; else one rank on each GPU, for models whose KV heads
they can share (`HARDKV_TEST_MODEL`).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from e2e.compressed import SHORT_INTERVALS, STRICT, compressed, decode, fresh_rid, hardkv_state, prompt_ids, report_of

from hardkv_sglang.cli.server_process import ServerProcess as Server

ServerFor = Callable[..., Server]
TWO_LAYERS = {"json-model-override-args": '{"num_hidden_layers": 2}'}
GPUS = torch.cuda.device_count()
ALL_RANKS = compressed(SHORT_INTERVALS, **TWO_LAYERS, **{"tp-size": GPUS or 3})
# SGLang wants cores named where ranks outnumber NUMA nodes, and tries NCCL wherever its library is found
ON_A_CPU = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1|0", "SGLANG_NCCL_SO_PATH": "/nonexistent"}


@pytest.mark.skipif(GPUS == 1, reason="needs several GPUs, or none")
def test_ranks_compress_in_step(server_for: ServerFor) -> None:
    server, num_tokens = server_for(ALL_RANKS, STRICT if GPUS else {**STRICT, **ON_A_CPU}), 300
    server.flush_cache()
    rids = [fresh_rid() for _ in range(4)]
    prompts = [prompt_ids(40, seed=500 + i) for i in range(4)]
    with ThreadPoolExecutor(4) as executor:
        replies = list(executor.map(lambda p, rid: decode(server, p, num_tokens, rid=rid), prompts, rids))
    # strict mode compares owned pages with the counts of all ranks at every step, on every rank
    assert [len(r["output_ids"]) for r in replies] == [num_tokens] * 4
    reports = [report_of(server, rid) for rid in rids]
    assert all(r["condense_events"] >= 2 for r in reports)
    assert all(r["held_pages"] < r["dense_pages"] for r in reports)
    assert hardkv_state(server)["postponed_events"] == 0
    server.check_idle()
