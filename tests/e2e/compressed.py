"""Server configurations of the compression tests, and what the tests ask of them."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch

from hardkv_sglang.cli.main import main
from hardkv_sglang.cli.server_process import ServerProcess as Server

# one worker has the servers of the whole model, another those of fewer layers: none is started by both
whole_model = pytest.mark.xdist_group("whole model")
fewer_layers = pytest.mark.xdist_group("fewer layers")
two_layers = pytest.mark.xdist_group("two layers")

PAGE = 32
# decode and prefill round differently: in bfloat16, which a GPU takes, stock SGLang differs from itself by up to 0.3
# (420 tokens of a random model of 8 layers)
LOGPROB_TOLERANCE = 0.5 if torch.cuda.is_available() else 1e-3
POOL_TOKENS = 2560

# short intervals, so that a few hundred tokens see several events
SHORT_INTERVALS: dict[str, Any] = {
    "recent_tokens": 32,
    "query_window": 16,
    "select_interval": 32,
    "condense_interval": 64,
    "min_tokens": 8,
    "top_p": 0.8,
}
LOG_INTERVAL = 10  # decode steps between two log lines
FIRST_EVENT = 64  # tokens past the dense prefix at the first select event, with these intervals
EVAL_PROMPT = "The lighthouse keeper wrote into his book every evening. This is what he wrote:"
STRICT = MappingProxyType({"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1", "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1"})
STOCK = MappingProxyType({"max-total-tokens": POOL_TOKENS, "chunked-prefill-size": 128})


def compressed(options: dict[str, Any], **flags: Any) -> dict[str, Any]:
    """Flags of a compressing server that lists finished requests, otherwise as `STOCK`."""
    options = {"request_reports": 64, **options}
    return {**STOCK, "kv-compression": "hardkv", "kv-compression-config": json.dumps(options), **flags}


SHORT = MappingProxyType(compressed(SHORT_INTERVALS, **{"enable-metrics": True, "decode-log-interval": LOG_INTERVAL}))
# bookkeeping needs no good text: real weights, less than half of the time
FEWER_LAYERS = MappingProxyType({"json-model-override-args": '{"num_hidden_layers": 8}'})
FAST = MappingProxyType({**SHORT, **FEWER_LAYERS})
# thousands of tokens in seconds
TWO_LAYERS = MappingProxyType({"json-model-override-args": '{"num_hidden_layers": 2}'})
TINY = MappingProxyType({**SHORT, **TWO_LAYERS})
TINY_STOCK = MappingProxyType({**STOCK, **TWO_LAYERS, "enable-metrics": True})
# nothing can be dropped, so no event would run by itself
EXACT_OPTIONS = {**SHORT_INTERVALS, "top_p": 1.0, "max_tokens": None, "min_freed_pages": 0}
EXACT = MappingProxyType(compressed(EXACT_OPTIONS))


def prompt_ids(num_tokens: int, seed: int) -> list[int]:
    """A prompt of common words; another seed shares no page with it."""
    return [(7919 * seed + 31 * i * i + 17 * i) % 20000 + 500 for i in range(num_tokens)]


def decode(server: Server, ids: Sequence[int], num_tokens: int, **payload: Any) -> Any:
    """Greedy continuation of exactly `num_tokens` tokens with their log-probabilities."""
    sampling = {
        "temperature": 0,
        "max_new_tokens": num_tokens,
        "ignore_eos": True,
        **payload.pop("sampling", {}),
    }
    return server.generate(input_ids=list(ids), sampling_params=sampling, return_logprob=True, **payload)


def output_logprobs(reply: Any) -> list[float]:
    """Log-probability of each generated token."""
    return [entry[0] for entry in reply["meta_info"]["output_token_logprobs"]]


def prefill_logprobs(server: Server, ids: Sequence[int], prompt_len: int) -> list[float]:
    """Dense log-probabilities of `ids[prompt_len:]`, from the server's own prefill."""
    reply = server.generate(
        input_ids=list(ids),
        sampling_params={"temperature": 0, "max_new_tokens": 1},
        return_logprob=True,
        logprob_start_len=prompt_len - 1,
    )
    return [entry[0] for entry in reply["meta_info"]["input_token_logprobs"]][1:]


def check_exact_start(server: Server, prompt: Sequence[int], reply: Any) -> None:
    """Until a first event can have run, an output sampled at temperature 1 or 0 has the dense model's probabilities."""
    ids = reply["output_ids"][: FIRST_EVENT - 1]
    exact = prefill_logprobs(server, [*prompt, *ids], len(prompt))
    assert output_logprobs(reply)[: len(ids)] == pytest.approx(exact, abs=LOGPROB_TOLERANCE)


def hardkv_state(server: Server) -> dict[str, Any]:
    """The `hardkv` block of `/server_info`."""
    return server.server_info()["internal_states"][0]["hardkv"]


def report_of(server: Server, rid: str) -> dict[str, Any]:
    """Report of a finished, compressed request."""
    (report,) = [r for r in hardkv_state(server)["requests"] if r["rid"] == rid]
    return report


def evaluate(server: Server, folder: Path, num_tokens: int) -> dict[str, Any]:
    """Result of `hardkv eval` for one prompt, as JSON."""
    prompts, out = folder / "prompts.txt", folder / "report.json"
    prompts.write_text(EVAL_PROMPT + "\n")
    command = ["eval", "--url", server.url, "--prompts", str(prompts), "--tokens", str(num_tokens), "--out", str(out)]
    assert main(command) == 0
    return json.loads(out.read_text())


def fresh_rid() -> str:
    """A request id that nobody used."""
    return uuid.uuid4().hex


def page_ceil(num_tokens: int) -> int:
    """Whole pages that hold `num_tokens` tokens, in tokens."""
    return -(-num_tokens // PAGE) * PAGE
