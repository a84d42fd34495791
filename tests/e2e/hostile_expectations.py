"""What stock SGLang does not survive, left out by name, and where we answer otherwise and why."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
from e2e.hostile_cases import Case
from e2e.hostile_fields import SERVED_MODEL, VOCABULARY

MOST_SAMPLES = 64
TOP_LOGPROBS = ("top_logprobs_num", "top_logprobs", "logprobs")
INT32_MAX = 2**31 - 1
# SGLang's declarations (sampling/sampling_params.py, managers/io_struct.py), which it does not check; without what we
# compute with, too: hostile values of custom_params, max_new_tokens and ignore_eos are never left out
STRINGS = str | list[str] | None
SAMPLING_TYPES: dict[str, Any] = {
    "stop": STRINGS, "stop_token_ids": set[int] | None, "stop_regex": STRINGS, "temperature": float | None,
    "top_p": float | None, "top_k": int | None, "min_p": float | None, "frequency_penalty": float | None,
    "presence_penalty": float | None, "repetition_penalty": float | None, "min_new_tokens": int | None, "n": int | None,
    "json_schema": str | None, "regex": str | None, "ebnf": str | None, "structural_tag": str | None,
    "skip_special_tokens": bool | None, "spaces_between_special_tokens": bool | None, "no_stop_trim": bool | None,
    "stream_interval": int | None, "logit_bias": dict[str, float] | None, "sampling_seed": int | None,
    "stop_strs": type(None), "is_normalized": type(None),  # SGLang's own
}  # fmt: skip
SESSION_TYPES: dict[str, Any] = {
    "id": str | None, "rid": str | None, "offset": int | None, "replace": bool | None,
    "drop_previous_output": bool | None,
}  # fmt: skip


@dataclass(frozen=True)
class Known:
    """Requests of one kind: the name, which they are, what happens, and whether that was seen or read in the code."""

    name: str
    applies: Callable[[dict[str, Any]], bool]  # to the fields of a request
    what: str
    is_seen: bool


def fields_of(case: Case) -> dict[str, Any]:
    """The fields of a request as the server reads them; none if it cannot."""
    try:
        body = json.loads(case.body)
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}


def sampling_of(fields: dict[str, Any]) -> list[dict[str, Any]]:
    """Sampling parameters, wherever the endpoint has them."""
    inner = fields.get("sampling_params")
    listed = inner if isinstance(inner, list) else [inner]
    return [fields, *(value for value in listed if isinstance(value, dict))]


def is_ill_typed(values: Any, types: dict[str, Any]) -> bool:
    """Whether a value is not of its declared type."""
    return isinstance(values, dict) and any(
        name in types and not _is(value, types[name]) for name, value in values.items()
    )


def _is(value: Any, type_: Any) -> bool:
    try:
        msgspec.convert(value, type_, strict=True)
    except msgspec.ValidationError:
        return False
    return True


def numbers(fields: dict[str, Any], name: str) -> Iterator[int | float]:
    """All numbers under that name, at the top or among the sampling parameters."""
    for values in sampling_of(fields):
        value = values.get(name)
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, int | float):
                yield item


def token_ids(fields: dict[str, Any]) -> Iterator[int]:
    """Token ids of all prompts."""
    for name in ("input_ids", "prompt"):
        value = fields.get(name)
        for item in value if isinstance(value, list) else []:
            yield from (i for i in (item if isinstance(item, list) else [item]) if isinstance(i, int))


ENDS_STOCK = (
    Known(
        "JSON schema as an object",
        lambda fields: any(isinstance(values.get("json_schema"), dict) for values in sampling_of(fields)[1:]),
        "/generate passes it on, and the scheduler looks the grammar up by it: an object has no hash",
        is_seen=True,
    ),
    Known(
        "ill-typed sampling parameter",
        lambda fields: any(is_ill_typed(values, SAMPLING_TYPES) for values in sampling_of(fields)[1:]),
        "/generate does not check types: logit_bias {'1': null} ends the scheduler",
        is_seen=True,
    ),
    Known(
        "ill-typed session parameter",
        lambda fields: is_ill_typed(fields.get("session_params"), SESSION_TYPES),
        "the scheduler looks the id up, and a list has no hash",
        is_seen=False,
    ),
    Known(
        "embedding overrides",
        lambda fields: fields.get("positional_embed_overrides") is not None,
        "meant for the engine: JSON has no value of their type, and the scheduler ends at any other",
        is_seen=True,
    ),
    Known(
        "custom labels",
        lambda fields: bool(fields.get("custom_labels")),
        "with --enable-metrics, a label that the series do not have ends the tokenizer manager",
        is_seen=True,
    ),
    Known(
        "thousands of samples",
        lambda fields: any(n > MOST_SAMPLES for n in numbers(fields, "n")),
        "the tokenizer copies the prompt n times: with n = 2**31 it would take all memory of the host",
        is_seen=False,
    ),
    Known(
        "negative token id",
        lambda fields: any(i < 0 for i in token_ids(fields)),
        "only the upper end of the vocabulary is checked: IndexError in the embedding",
        is_seen=False,
    ),
    Known(
        "top_k beyond 32 bits",
        lambda fields: any(k > INT32_MAX for k in numbers(fields, "top_k")),
        "the scheduler packs it into an int32 tensor",
        is_seen=False,
    ),
    Known(
        "more log-probabilities than tokens",
        lambda fields: any(not 0 <= n <= VOCABULARY for name in TOP_LOGPROBS for n in numbers(fields, name)),
        "the scheduler calls topk with more than the vocabulary",
        is_seen=False,
    ),
    Known(
        "stop token beyond the vocabulary with a minimal length",
        lambda fields: any(not 0 <= i < VOCABULARY for i in numbers(fields, "stop_token_ids"))
        and any(n > 0 for name in ("min_new_tokens", "min_tokens") for n in numbers(fields, name)),
        "the penalty of stop tokens is an index into the logits",
        is_seen=False,
    ),
    Known(
        "extra key as a list",
        lambda fields: isinstance(fields.get("extra_key"), list | dict),
        "meant for a batch, it goes to the scheduler as it is for a single prompt: a key of the radix tree has to have "
        "a hash",
        is_seen=True,
    ),
    Known(
        "log-probabilities of chosen tokens",
        lambda fields: bool(fields.get("return_logprob")) and fields.get("token_ids_logprob") is not None,
        "beside a request that asks for none, the scheduler makes a list of what is one; /v1/score asks for them, too",
        is_seen=True,
    ),
    Known(
        "new weights with a flush, or at random",
        lambda fields: fields.get("model_path") == SERVED_MODEL
        and (fields.get("flush_cache") is not False or fields.get("load_format") == "dummy"),
        "the update waits for the last answer, not for the step after it, and while paused for nothing: with anything "
        "left in the scheduler, its assertion that the flush succeeded ends it; dummy weights make all answers random",
        is_seen=True,
    ),
    Known(
        "unknown load format",
        lambda fields: fields.get("load_format") not in (None, "auto", "dummy"),
        "LoadConfig raises in the scheduler for a format that it does not know; seen on our server, in SGLang's frames",
        is_seen=False,
    ),
)  # fmt: skip


def override_of(values: dict[str, Any]) -> Any:
    """The compression that a request asks for; `hardkv` if it does not say."""
    custom = values.get("custom_params")
    return custom.get("kv_compression", "hardkv") if isinstance(custom, dict) else "hardkv"


OUR_REASONS = (
    Known(
        "malformed override",
        lambda fields: any(override_of(values) not in ("none", "hardkv") for values in sampling_of(fields)),
        "a request that misspells how it wants to be compressed is refused; stock knows no such parameter",
        is_seen=True,
    ),
)  # fmt: skip


def reason(table: tuple[Known, ...], case: Case) -> Known | None:
    """The row that a case belongs to."""
    fields = fields_of(case)
    return next((known for known in table if known.applies(fields)), None)
