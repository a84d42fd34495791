"""A server whose survivors have 8 or 4 bits: fewer pages, every page accounted for, and nearly dense probabilities."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from e2e.compressed import (
    EXACT_OPTIONS,
    FEWER_LAYERS,
    STRICT,
    compressed,
    decode,
    fewer_layers,
    fresh_rid,
    hardkv_state,
    output_logprobs,
    prefill_logprobs,
    prompt_ids,
    report_of,
)

from hardkv_sglang.cli.server_process import ServerProcess as Server
from hardkv_sglang.memory_pool.row_format import RowFormat

ServerFor = Callable[..., Server]
pytestmark = [fewer_layers, pytest.mark.skipif(torch.cuda.is_available(), reason="refused on a GPU")]
TOKENS = 420
MEAN_DIFFERENCE = {8: 0.02, 4: 0.15}  # of log-probabilities, nats


def run(server: Server) -> tuple[Any, dict[str, Any]]:
    rid = fresh_rid()
    reply = decode(server, prompt_ids(45, seed=4), TOKENS, rid=rid)
    return reply, report_of(server, rid)


@pytest.mark.parametrize("bits", [8, 4])
def test_nothing_dropped_in_fewer_bits(server_for: ServerFor, bits: int) -> None:
    """All tokens survive, in as many pages as their bits take; strict checks count every page in every step."""
    server = server_for(compressed({**EXACT_OPTIONS, "survivor_bits": bits}, **FEWER_LAYERS), STRICT)
    reply, report = run(server)
    assert report["condense_events"] >= 3
    assert report["kept_p10"] == report["kept_max"]
    page_bytes = hardkv_state(server)["page_bytes"]
    element_bytes = page_bytes // (2 * 8 * 3 * 64 * 32)
    tokens = RowFormat(bits, 64, 32, element_bytes).tokens
    # 64 tokens of prompt in whole pages; what has not been condensed is the window and less than two intervals
    assert report["dense_pages"] - report["held_pages"] >= (TOKENS - 32 - 3 * 32 - 64) // 32 - -(-TOKENS // tokens)
    dense = prefill_logprobs(server, prompt_ids(45, seed=4) + reply["output_ids"], 45)
    differences = [abs(a - b) for a, b in zip(output_logprobs(reply), dense, strict=True)]
    assert 0 < sum(differences) / TOKENS < MEAN_DIFFERENCE[bits]
