"""A radix tree as deep as a conversation is long, and several tokenizer workers whose clients choose one id.

On a CPU a prefill takes time quadratic in the whole length, cached or not: the server has a small random model, and
`make test` has a tenth of the turns of `make fuzz`, whose tree is deeper than Python recurses.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from e2e.compressed import (
    FIRST_EVENT,
    LOGPROB_TOLERANCE,
    SHORT_INTERVALS,
    STRICT,
    compressed,
    hardkv_state,
    output_logprobs,
    prompt_ids,
    two_layers,
)
from transformers import LlamaConfig, LlamaForCausalLM

from hardkv_sglang.cli.server_process import ServerProcess as Server

pytestmark = two_layers
PAGE = 16  # a turn of that many tokens makes one node of the tree
SHORT_OUTPUT, LONG_OUTPUT = 2, 130  # the latter has had its first condense event
LONG_EVERY = 50  # turns
VOCABULARY = 2048
SAME_RID, NUM_WORKERS = "same", 2
MOST_BURSTS = 20


@pytest.fixture(scope="module")
def num_turns(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--chain-turns"))


@pytest.fixture(scope="module")
def context_len(num_turns: int) -> int:
    return (num_turns + 2) * PAGE + num_turns // LONG_EVERY * (LONG_OUTPUT + PAGE)


@pytest.fixture(scope="module")
def model(context_len: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Attention that is sharp enough for one wrong token to show."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, max_position_embeddings=context_len, initializer_range=0.5,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def server(server_for: Callable[..., Server], model: Path, context_len: int) -> Server:
    flags = {
        "model-path": model,  # SGLang takes the last one
        "skip-tokenizer-init": True,  # SGLang's detokenizer ends with two requests of one id in one batch
        "tokenizer-worker-num": NUM_WORKERS,
        "page-size": PAGE,
        "max-total-tokens": context_len + 128 * PAGE,
        "chunked-prefill-size": 2048,
        "enable-metrics": True,
    }
    # a worker that is not ready in 10 seconds is killed and started again, for ever
    patience = {"SGLANG_UVICORN_WORKER_HEALTHCHECK_TIMEOUT": "300"}
    return server_for(compressed(SHORT_INTERVALS, **flags), {**STRICT, **patience})


def small_ids(num_tokens: int, seed: int) -> list[int]:
    return [token % VOCABULARY for token in prompt_ids(num_tokens, seed)]


def generate(session: requests.Session, server: Server, ids: list[int], num_tokens: int, **payload: Any) -> Any:
    sampling = {"temperature": 0, "max_new_tokens": num_tokens, "ignore_eos": True}
    body = {"input_ids": ids, "sampling_params": sampling, "return_logprob": True, **payload}
    reply = session.post(f"{server.url}/generate", json=body, timeout=600)
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_a_chain_of_turns(server: Server, num_turns: int) -> None:
    before = hardkv_state(server)["condense_events"]
    ids, last_prompt = small_ids(PAGE - SHORT_OUTPUT, seed=950), 0
    said: list[tuple[int, list[float]]] = []  # where an output begins, and the log-probabilities of its exact tokens
    with requests.Session() as session:
        for turn in range(1, num_turns + 1):
            reply = generate(session, server, ids, SHORT_OUTPUT if turn % LONG_EVERY else LONG_OUTPUT)
            assert reply["meta_info"]["cached_tokens"] >= last_prompt // PAGE * PAGE
            said.append((len(ids), output_logprobs(reply)[:FIRST_EVENT]))
            last_prompt = len(ids)
            ids += reply["output_ids"]
            ids += small_ids(-(len(ids) + SHORT_OUTPUT) % PAGE or PAGE, seed=turn)
        assert hardkv_state(server)["condense_events"] >= before + num_turns // LONG_EVERY
        # all of it once more, dense and from no cache
        server.flush_cache()
        reply = generate(session, server, ids, 1, logprob_start_len=0)
    assert reply["meta_info"]["cached_tokens"] == 0
    dense = [entry[0] for entry in reply["meta_info"]["input_token_logprobs"]]
    for start, logprobs in said:
        assert logprobs == pytest.approx(dense[start : start + len(logprobs)], abs=LOGPROB_TOLERANCE)
    server.check_idle()


def test_one_request_id_in_two_tokenizer_workers(server: Server) -> None:
    num_clients = 6
    prompts = [small_ids(40 + 9 * i, seed=960 + i) for i in range(num_clients)]
    lengths = [150 + 40 * i for i in range(num_clients)]  # the first to end leaves another one running
    server.flush_cache()
    with requests.Session() as session:
        alone = [generate(session, server, *job)["output_ids"] for job in zip(prompts, lengths, strict=True)]

    def ask(client: int) -> requests.Response:
        sampling = {"temperature": 0, "max_new_tokens": lengths[client], "ignore_eos": True}
        body = {"input_ids": prompts[client], "sampling_params": sampling, "rid": SAME_RID}
        return requests.post(f"{server.url}/generate", json=body, timeout=600)

    # a worker takes an id once at a time and knows nothing of the other worker; which of them gets a connection is up
    # to the kernel
    for _ in range(MOST_BURSTS):
        with ThreadPoolExecutor(num_clients) as executor:
            replies = list(executor.map(ask, range(num_clients)))
        answered = [client for client, reply in enumerate(replies) if reply.status_code == 200]
        assert answered
        for client in answered:
            assert replies[client].json()["output_ids"] == alone[client]
        refused = [reply.text for reply in replies if reply.status_code != 200]
        assert all("Duplicate request ID" in text for text in refused)
        if len(answered) == NUM_WORKERS:
            break
    else:
        raise AssertionError("one worker got all connections")
    server.check_idle()
