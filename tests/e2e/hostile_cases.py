"""Hostile requests: well-formed ones of every endpoint, each with one to three fields turned against the server."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import hypothesis
from e2e.compressed import prompt_ids
from e2e.hostile_fields import (
    ABORT,
    ABSENT,
    CHAT,
    COMPLETION,
    CONTINUE,
    GENERATE,
    JUNK,
    MEMORY,
    PAUSE,
    SAMPLING,
    WEIGHTS,
)
from hypothesis import strategies as st


@dataclass(frozen=True)
class Case:
    """One request; `body` is what goes over the wire."""

    path: str
    body: str
    fields: tuple[str, ...]  # those that were changed, for reports

    def __str__(self) -> str:
        return f"{self.path} [{', '.join(self.fields)}] {self.body[:400]}"


SHORT_SAMPLING = {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True}
BASES: Mapping[str, tuple[dict[str, Any], Mapping[str, Sequence[Any]]]] = {
    "/generate": ({"input_ids": prompt_ids(40, 7), "sampling_params": SHORT_SAMPLING}, GENERATE),
    "/v1/completions": ({"model": "default", "prompt": "The history of bread", "max_tokens": 6, "temperature": 0},
    COMPLETION),
    "/v1/chat/completions": (
        {"model": "default", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 6, "temperature": 0},
        CHAT,
    ),
    "/abort_request": ({"rid": "nobody"}, ABORT),
    "/flush_cache": ({}, {"unknown": JUNK}),
    "/pause_generation": ({"mode": "abort"}, PAUSE),
    "/continue_generation": ({}, CONTINUE),
    "/update_weights_from_disk": ({"model_path": "nowhere"}, WEIGHTS),
    "/release_memory_occupation": ({}, MEMORY),
}  # fmt: skip
# three quarters go to the endpoints that every client may call
PATHS = [*["/generate"] * 8, *["/v1/completions"] * 4, *["/v1/chat/completions"] * 4, *list(BASES)[3:]]
QUERIES = ("", "", "", "?timeout=0", "?timeout=-1", "?timeout=x", "?timeout=1e308", "?timeout=nan", "?x=1")


def changed(
    draw: st.DrawFn, base: dict[str, Any], fields: Mapping[str, Sequence[Any]], count: int
) -> tuple[Any, list[str]]:
    """`base` with `count` of the fields set to one of their own hostile values, or to one that is nobody's."""
    body, names = dict(base), []
    for name in draw(st.lists(st.sampled_from(sorted(fields)), min_size=count, max_size=count, unique=True)):
        value = draw(st.sampled_from(fields[name])) if draw(st.integers(0, 7)) else draw(st.sampled_from(JUNK))
        names.append(name)
        body.pop(name, None)
        if value is not ABSENT:
            body[name] = value
    return body, names


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any hostile request."""
    path = draw(st.sampled_from(PATHS))
    base, fields = BASES[path]
    body, names = changed(draw, base, fields, min(draw(st.sampled_from((1, 1, 1, 2, 2, 3))), len(fields)))
    if path == "/generate" and draw(st.booleans()):
        sampling, more = changed(draw, SHORT_SAMPLING, SAMPLING, draw(st.sampled_from((1, 1, 2))))
        body["sampling_params"], names = sampling, [*names, *more] if draw(st.booleans()) else more
        if names is more:
            body = {**base, "sampling_params": sampling}
    if "text" in names:
        body.pop("input_ids", None)
    if path == "/flush_cache":
        path += draw(st.sampled_from(QUERIES))
    return Case(path, wire(draw, body), tuple(names))


def wire(draw: st.DrawFn, body: Any) -> str:
    """The body as text: mostly as it is; now and then cut off, with every key twice, or not an object at all."""
    text = json.dumps(body)
    damage = draw(st.integers(0, 79))
    if damage == 0:
        return text[: len(text) // 2]
    if damage == 1 and len(text) > 2:
        return text[:-1] + ", " + text[1:]
    if damage == 2:
        return json.dumps(draw(st.sampled_from([value for value in JUNK if value is not ABSENT])))
    return "" if damage == 3 else text


def generate_cases(count: int, seed: int) -> list[Case]:
    """`count` different cases; the same for the same seed."""
    found: dict[Case, None] = {}
    attempt = 0
    while len(found) < count:

        @hypothesis.seed(seed + 1_000_003 * attempt)
        @hypothesis.settings(
            max_examples=count, database=None, deadline=None, phases=[hypothesis.Phase.generate],
            suppress_health_check=list(hypothesis.HealthCheck),
        )  # fmt: skip
        @hypothesis.given(cases())
        def collect(case: Case) -> None:
            found[case] = None

        collect()
        attempt += 1
    return list(found)[:count]
