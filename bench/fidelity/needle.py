"""Facts planted in the generated part and asked for at its end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

FACTS = (("red", "48213", 0.1), ("green", "90576", 0.35), ("blue", "31748", 0.6), ("white", "62095", 0.85))
"""Name, secret and depth in the generated part."""
ASKED = (2, 0, 3, 1)
"""Order of the questions: not that of the facts."""

Tokenize = Callable[[str], list[int]]


@dataclass(frozen=True)
class Span:
    """Tokens of one answer."""

    name: str
    depth: float  # where the fact stood, as a fraction of the generated part
    start: int  # position of the first answer token
    end: int


def fact_text(name: str, secret: str) -> str:
    """The sentence that is planted."""
    return f"\n\nRemember: the secret code of the {name} box is {secret}.\n\n"


def question_text(name: str) -> str:
    """What is asked, up to the answer."""
    return f"\n\nQuestion: What is the secret code of the {name} box?\nAnswer: The secret code of the {name} box is"


def plant(
    filler: Sequence[int], prompt_len: int, generated_len: int, tokenize: Tokenize
) -> tuple[torch.Tensor, list[Span]]:
    """A document with facts at their depths and questions at the end; returns tokens and answer spans."""
    tokens = list(filler[:prompt_len])
    taken = prompt_len
    for name, secret, depth in FACTS:
        until = prompt_len + int(depth * generated_len)
        tokens += filler[taken:until]
        tokens += tokenize(fact_text(name, secret))
        taken = until
    tokens += filler[taken : prompt_len + generated_len]
    spans = []
    for index in ASKED:
        name, secret, depth = FACTS[index]
        tokens += tokenize(question_text(name))
        answer = tokenize(f" {secret}")
        spans.append(Span(name, depth, len(tokens), len(tokens) + len(answer)))
        tokens += answer
    # one token more: what the last answer token predicts
    return torch.tensor([*tokens, *tokenize("\n")[:1]]), spans
