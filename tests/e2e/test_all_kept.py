"""At p = 1 compression moves tokens and drops none: what it computes is dense attention."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from e2e.compressed import (
    EXACT,
    LOGPROB_TOLERANCE,
    STOCK,
    STRICT,
    decode,
    evaluate,
    fresh_rid,
    output_logprobs,
    prefill_logprobs,
    prompt_ids,
    report_of,
    whole_model,
)

from hardkv_sglang.cli.server_process import ServerProcess as Server

ServerFor = Callable[..., Server]
pytestmark = whole_model


def prefill_differences(server: Server, prompt: list[int], reply: Any) -> list[float]:
    """How far the log-probability of each generated token is from that of the server's own prefill."""
    dense = prefill_logprobs(server, prompt + reply["output_ids"], len(prompt))
    return [abs(a - b) for a, b in zip(output_logprobs(reply), dense, strict=True)]


def test_p_one_equals_dense(server_for: ServerFor) -> None:
    server, rid, prompt = server_for(EXACT, STRICT), fresh_rid(), prompt_ids(45, seed=4)
    reply = decode(server, prompt, 420, rid=rid)
    report = report_of(server, rid)
    assert report["select_events"] >= 3
    assert report["condense_events"] >= 2
    assert report["kept_p10"] == report["kept_max"]
    allowed = LOGPROB_TOLERANCE
    if torch.cuda.is_available():
        # 16 bits: stock's decode and prefill differ as well, and every tier adds a rounding
        stock = server_for(STOCK, STRICT)
        allowed = 1.5 * max(prefill_differences(stock, prompt, decode(stock, prompt, 420)))
    assert max(prefill_differences(server, prompt, reply)) <= allowed


def test_eval_of_exact_compression_is_zero(server_for: ServerFor, tmp_path: Path) -> None:
    report = evaluate(server_for(EXACT, STRICT), tmp_path, 200)
    assert report["select_events"] >= 2
    assert report["max_difference"] < LOGPROB_TOLERANCE
    assert report["agreement"] >= 0.99
