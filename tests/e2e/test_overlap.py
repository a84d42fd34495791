"""The overlap scheduler changes nothing of what compression does."""

from __future__ import annotations

from collections.abc import Callable

from e2e.compressed import FAST, STRICT, decode, fewer_layers, fresh_rid, output_logprobs, prompt_ids, report_of

from hardkv_sglang.cli.server_process import ServerProcess as Server

pytestmark = fewer_layers
SERIAL = {**FAST, "disable-overlap-schedule": True}


def test_overlap_on_and_off_agree(server_for: Callable[..., Server]) -> None:
    prompt = prompt_ids(70, seed=5)
    normal, overlapped = server_for(SERIAL, STRICT), server_for(FAST, STRICT)
    rid = fresh_rid()
    first, second = decode(overlapped, prompt, 300, rid=rid), decode(normal, prompt, 300, rid=rid)
    assert first["output_ids"] == second["output_ids"]
    assert output_logprobs(first) == output_logprobs(second)
    assert report_of(overlapped, rid) == report_of(normal, rid)
    assert report_of(normal, rid)["condense_events"] >= 2
