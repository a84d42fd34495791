"""One configuration on one document, and its result file."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.fidelity.configurations import Configuration
from bench.fidelity.model import BlockModel
from bench.fidelity.needle import Span
from bench.fidelity.scores import Reference, TokenScores
from bench.fidelity.session import PAGE_SIZE, CompressedSession

HOLDINGS_EVERY = 16  # decoded tokens between two recorded holdings
COMMON_WINDOW = 128  # newest tokens that the kept fraction leaves out, for every configuration


@dataclass(frozen=True)
class Text:
    """A tokenised document."""

    name: str
    number: int  # place in the list of documents
    tokens: torch.Tensor  # [N + 1]
    prompt_len: int
    spans: list[Span] = field(default_factory=list)  # answers, in a needle document

    @property
    def decode_len(self) -> int:
        """Tokens that are decoded under compression."""
        return len(self.tokens) - 1 - self.prompt_len


def result_path(folder: Path, text: Text, configuration: Configuration) -> Path:
    """Where the result of a task is stored."""
    return folder / f"{text.name}-{text.prompt_len}-{text.decode_len}-{configuration.key}.json"


def run_task(model: BlockModel, reference: Reference, text: Text, configuration: Configuration) -> dict[str, Any]:
    """Decode one document under one configuration; returns everything the report needs."""
    started = time.perf_counter()
    session = CompressedSession(model.shape, configuration.config, len(text.tokens))
    with torch.inference_mode():
        session.prefill(reference.cache, text.prompt_len)
        scores = score_blocks(model, reference, session)
    session.release()
    return {
        "document": text.name,
        "options": configuration.options,
        "prompt_len": text.prompt_len,
        "decode_len": text.decode_len,
        "num_kv_heads": model.shape.num_kv_heads,
        "seconds": round(time.perf_counter() - started, 2),
        "kl": [round(value, 8) for value in scores.kl.tolist()],
        "agrees": "".join("01"[value] for value in scores.agrees.tolist()),
        "first_event": sum(not holding.is_compressed for holding in session.holdings),
        "dense_nll": masked_mean(scores.dense_nll, session),
        "compressed_nll": masked_mean(scores.compressed_nll, session),
        "bytes": held_fractions(session, text.prompt_len),
        "holdings": [asdict(holding) for holding in session.holdings[::HOLDINGS_EVERY]],
        "selected": [asdict(selected) for selected in session.selected],
        "answers": answer_scores(scores, text),
    }


def score_blocks(model: BlockModel, reference: Reference, session: CompressedSession) -> TokenScores:
    """Decode the document and compare each token's prediction with the dense one."""
    parts, done = [], 0
    targets = reference.tokens[reference.prompt_len + 1 :]
    for hidden in session.decode(model, reference.decoded):
        block = slice(done, done + len(hidden))
        parts.append(TokenScores.of_hidden(model, reference.hidden[block], hidden, targets[block]))
        done += len(hidden)
    return TokenScores.join(parts)


def masked_mean(values: torch.Tensor, session: CompressedSession) -> float:
    """Mean over the tokens after the first event."""
    compressed = torch.tensor([holding.is_compressed for holding in session.holdings])
    return float(values[compressed].mean()) if compressed.any() else 0.0


def held_fractions(session: CompressedSession, prompt_len: int) -> dict[str, float]:
    """Real token pages relative to those of dense KV; means over decoded tokens, and at the end.

    kept: the condensed tier only. Condensed token pages over the token pages that they replaced, over the tokens
    for which there are any; a recent window other than `COMMON_WINDOW` counts with its difference on both sides.
    generated: all pages beyond the prompt's, recent window and sparse span included, after the first event.
    request: all pages, prompt included, after the first event.
    attended: kept tokens over candidates, over select events.
    """
    prompt_pages = -(-prompt_len // PAGE_SIZE)
    prefix_end = session.state.prefix_end
    window_pages = (session.cfg.options.recent_tokens - COMMON_WINDOW) / PAGE_SIZE
    kept, generated, request = [], [], []
    for holding in session.holdings:
        dense_pages = -(-(holding.position + 1) // PAGE_SIZE)
        if holding.condensed_end > prefix_end:
            replaced = (holding.condensed_end - prefix_end) / PAGE_SIZE
            kept.append((holding.condensed_pages + window_pages) / (replaced + window_pages))
        if holding.is_compressed:
            generated.append((holding.held_pages - prompt_pages) / (dense_pages - prompt_pages))
            request.append(holding.held_pages / dense_pages)
    lists = session.cfg.layout.columns
    attended = [sum(event.counts) / (event.candidates * lists) for event in session.selected]
    return {
        "kept": mean(kept),
        "generated": mean(generated),
        "generated_end": generated[-1] if generated else 1.0,
        "request": mean(request),
        "request_end": request[-1] if request else 1.0,
        "attended": mean(attended),
    }


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean; 1 for no values (nothing was compressed)."""
    return sum(values) / len(values) if values else 1.0


def answer_scores(scores: TokenScores, text: Text) -> list[dict[str, Any]]:
    """Per needle: mean log-probability of the answer, and whether every token of it was the most likely."""
    answers = []
    for span in text.spans:
        # the token before an answer token predicts it
        block = slice(span.start - 1 - text.prompt_len, span.end - 1 - text.prompt_len)
        answers.append(
            {
                "name": span.name,
                "depth": span.depth,
                "dense_correct": bool(scores.dense_correct[block].all()),
                "compressed_correct": bool(scores.compressed_correct[block].all()),
                "dense_nll": float(scores.dense_nll[block].mean()),
                "compressed_nll": float(scores.compressed_nll[block].mean()),
            }
        )
    return answers


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write a result file so that an interrupted run leaves no partial one."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result))
    partial.replace(path)
