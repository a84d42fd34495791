"""The requests of the load: each kind sends one, checks its answer and says how it ended."""

from __future__ import annotations

import json
import random
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

from bench.soak.client import Client, SoakError

FINISHED, ABORTED, DISCONNECTED = "finished", "aborted", "disconnected"
SYSTEM = "You are the keeper of a lighthouse. You answer every question with care, and you never leave your tower. " * 4
NAME = {"type": "string", "maxLength": 12}
SCHEMA = json.dumps(
    {"type": "object", "properties": {"name": NAME}, "required": ["name"], "additionalProperties": False}
)
FIRST_ID, LAST_ID = 500, 20000  # token ids of random prompts: words, in every vocabulary


@dataclass(frozen=True)
class Job:
    """What a kind works with."""

    client: Client
    rng: random.Random
    max_prompt: int  # tokens
    max_output: int  # tokens

    def prompt(self) -> list[int]:
        """A random prompt; half of them begin like others, on and off a page boundary."""
        length = self.rng.randint(1, self.max_prompt)
        ids = [self.rng.randint(FIRST_ID, LAST_ID) for _ in range(length)]
        shared = random.Random(self.rng.randrange(4))
        if self.rng.random() < 0.5:
            ids[:0] = [shared.randint(FIRST_ID, LAST_ID) for _ in range(self.rng.choice((31, 32, 33, 64)))]
        return ids

    def num_tokens(self) -> int:
        """Length of an output: short ones, and those that see many events."""
        return self.rng.choice((1, self.max_output // 16, self.rng.randint(1, self.max_output), self.max_output))


def sampling(num_tokens: int, **more: Any) -> dict[str, Any]:
    """Parameters of exactly `num_tokens` greedy tokens."""
    return {"temperature": 0, "max_new_tokens": num_tokens, "ignore_eos": True, **more}


def ending(meta: dict[str, Any]) -> str:
    """How a request ended. Raises `SoakError` for an abort that is an error."""
    reason = meta["finish_reason"]
    if reason["type"] != "abort":
        return FINISHED
    if reason.get("status_code") not in (None, 200):
        raise SoakError(f"aborted with an error: {reason}")
    return ABORTED


def expect(condition: bool, what: str, answer: Any) -> None:
    """Raise `SoakError` with the answer unless the condition holds."""
    if not condition:
        raise SoakError(f"{what}: {str(answer)[:1000]}")


def one_output(job: Job, body: dict[str, Any], **parameters: Any) -> str:
    """One output of a known length."""
    num_tokens = job.num_tokens()
    request = {"input_ids": job.prompt(), "sampling_params": sampling(num_tokens, **parameters), **body}
    answer = job.client.ask("/generate", request)
    end = ending(answer["meta_info"])
    expect(end == ABORTED or len(answer["output_ids"]) == num_tokens, f"not {num_tokens} tokens", answer)
    return end


def plain(job: Job) -> str:
    """A greedy output."""
    return one_output(job, {})


def sampled(job: Job) -> str:
    """An output at temperature 1."""
    return one_output(job, {}, temperature=1.0, top_p=0.9, min_p=0.02)


def opted_out(job: Job) -> str:
    """A request that stays dense."""
    return one_output(job, {}, custom_params={"kv_compression": "none"})


def prioritised(job: Job) -> str:
    """A request with a priority."""
    return one_output(job, {"priority": job.rng.randint(-2, 2)})


def streamed(job: Job) -> str:
    """A streamed output: as many tokens as asked for, and text that only grows."""
    num_tokens, piece, text = job.num_tokens(), None, ""
    with job.client.stream("/generate", {"input_ids": job.prompt(), "sampling_params": sampling(num_tokens)}) as pieces:
        for piece in pieces:
            expect(len(piece["text"]) >= len(text) - 4, "the text got shorter", piece)
            text = piece["text"]
    expect(piece is not None, "an empty stream", piece)
    assert piece is not None
    end = ending(piece["meta_info"])
    expect(end == ABORTED or piece["meta_info"]["completion_tokens"] == num_tokens, f"not {num_tokens} tokens", piece)
    return end


def chat(job: Job) -> str:
    """Two turns behind a system prompt that all chats share."""
    messages = [{"role": "system", "content": SYSTEM}]
    end = FINISHED
    for _ in range(2):
        messages.append({"role": "user", "content": f"What did you see at {job.rng.randrange(24)} o'clock?"})
        body = {"model": "default", "messages": messages, "temperature": 0, "max_tokens": job.num_tokens()}
        choice = job.client.ask("/v1/chat/completions", body)["choices"][0]
        expect(choice["finish_reason"] in ("stop", "length", "abort"), "an unknown end", choice)
        if choice["finish_reason"] == "abort":
            return ABORTED
        messages.append({"role": "assistant", "content": choice["message"]["content"] or ""})
    return end


def parallel(job: Job) -> str:
    """Two samples of one prompt."""
    num_tokens = job.num_tokens()
    answers = job.client.ask(
        "/generate", {"input_ids": job.prompt(), "sampling_params": sampling(num_tokens, n=2, temperature=0.8)}
    )
    expect(len(answers) == 2, "not two samples", answers)
    ends = [ending(answer["meta_info"]) for answer in answers]
    complete = all(
        end == ABORTED or len(answer["output_ids"]) == num_tokens for end, answer in zip(ends, answers, strict=True)
    )
    expect(complete, f"not {num_tokens} tokens each", answers)
    return ABORTED if ABORTED in ends else FINISHED


def stopped(job: Job) -> str:
    """A stop string, which is not part of the answer."""
    stop, num_tokens = [" the", "\n\n", "t77"], job.num_tokens()
    body = {"input_ids": job.prompt(), "sampling_params": sampling(num_tokens, stop=stop)}
    answer = job.client.ask("/generate", body)
    end = ending(answer["meta_info"])
    if answer["meta_info"]["finish_reason"]["type"] == "stop":
        expect(not any(word in answer["text"] for word in stop), "the stop string is in the answer", answer)
    else:
        expect(end == ABORTED or len(answer["output_ids"]) == num_tokens, f"neither stopped nor {num_tokens}", answer)
    return end


def structured(job: Job) -> str:
    """An object that follows a schema."""
    body = {
        "input_ids": job.prompt(),
        "sampling_params": {"temperature": 1.0, "max_new_tokens": 64, "json_schema": SCHEMA},
    }
    answer = job.client.ask("/generate", body)
    end = ending(answer["meta_info"])
    if answer["meta_info"]["finish_reason"]["type"] == "stop":
        try:
            expect(set(json.loads(answer["text"])) == {"name"}, "not of the schema", answer)
        except ValueError as error:
            raise SoakError(f"not JSON: {answer['text'][:500]!r}") from error
    return end


def with_logprobs(job: Job) -> str:
    """Log-probabilities of prompt and output: one for every token, none above 0."""
    prompt, num_tokens = job.prompt(), job.num_tokens()
    body = {
        "input_ids": prompt, "sampling_params": sampling(num_tokens), "return_logprob": True, "logprob_start_len": 0,
        "top_logprobs_num": 2,
    }  # fmt: skip
    answer = job.client.ask("/generate", body)
    meta = answer["meta_info"]
    end = ending(meta)
    if end == ABORTED:
        return end
    output = [entry[0] for entry in meta["output_token_logprobs"]]
    expect(len(output) == num_tokens == len(meta["output_top_logprobs"]), "not one for each token", meta)
    expect(len(meta["input_token_logprobs"]) == len(prompt), "not one for each token of the prompt", meta)
    expect(all(value <= 1e-4 for value in output), "not a log-probability", output)
    return end


def aborted(job: Job) -> str:
    """A stream that is aborted after some pieces; it may finish before."""
    rid, meta = uuid.uuid4().hex, None
    body = {"input_ids": job.prompt(), "sampling_params": sampling(job.max_output), "rid": rid}
    patience = job.rng.randrange(job.max_output)
    with job.client.stream("/generate", body) as pieces:
        for number, piece in enumerate(pieces):
            meta = piece["meta_info"]
            if number == patience:
                Client(job.client.url).abort(rid)
    expect(meta is not None, "an empty stream", body)
    assert meta is not None
    return ending(meta)


def aborted_early(job: Job) -> str:
    """A request that is aborted about when it is queued: the abort may come first."""
    rid = uuid.uuid4().hex
    body = {"input_ids": job.prompt(), "sampling_params": sampling(job.max_output), "rid": rid}
    with job.client.stream("/generate", body) as pieces:
        Client(job.client.url).abort(rid)
        meta = [piece["meta_info"] for piece in pieces][-1]
    return ending(meta)


def disconnected(job: Job) -> str:
    """A client that leaves in the middle of its answer."""
    body = {"input_ids": job.prompt(), "sampling_params": sampling(job.max_output)}
    with job.client.stream("/generate", body) as pieces:
        for _ in islice(pieces, job.rng.randrange(job.max_output)):
            pass
    return DISCONNECTED


@dataclass(frozen=True)
class Kind:
    """One kind of request."""

    name: str
    run: Callable[[Job], str]
    weight: int  # share of the load
    may_abort: bool = False  # without anybody else's abort


KINDS = (
    Kind("plain", plain, 4),
    Kind("sampled", sampled, 2),
    Kind("opt-out", opted_out, 2),
    Kind("priority", prioritised, 2),
    Kind("stream", streamed, 4),
    Kind("chat", chat, 3),
    Kind("n=2", parallel, 2),
    Kind("stop", stopped, 2),
    Kind("json", structured, 1),
    Kind("logprobs", with_logprobs, 2),
    Kind("abort", aborted, 2, may_abort=True),
    Kind("abort-early", aborted_early, 1, may_abort=True),
    Kind("disconnect", disconnected, 2),
)
NAMES = tuple(kind.name for kind in KINDS)
