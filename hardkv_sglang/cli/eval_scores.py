"""Two scorings of the same tokens, and what their difference says: KL, agreement, and where in the output it lies."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import mean, stdev
from typing import Any

BIN = 128  # tokens of a step in `kl_by_position`


@dataclass(frozen=True)
class Scored:
    """Tokens with their log-probabilities and the most likely token at each place."""

    ids: list[int]
    logprobs: list[float]
    top_ids: list[int]

    @classmethod
    def of(cls, entries: Iterable[Any], tops: Iterable[Any]) -> Scored:
        """Read SGLang's lists of (log-probability, token, text)."""
        entries = list(entries)
        return cls([e[1] for e in entries], [e[0] for e in entries], [top[0][1] for top in tops])


@dataclass(frozen=True)
class PromptScore:
    """One generated text. Log-probabilities are natural logarithms; the first tokens may be left out of all figures."""

    prompt_tokens: int
    output_tokens: int  # that count
    kl: float  # mean of log p(generation) - log p(prefill) over the sampled tokens
    max_difference: float  # largest absolute difference
    agreement: float  # share of tokens at which both have the same most likely token
    differences: list[float]  # token by token

    @classmethod
    def of(cls, prompt_tokens: int, generated: Scored, prefilled: Scored, first: int = 0) -> PromptScore:
        """Compare two scorings of the same tokens, from output token `first` on."""
        pairs = list(zip(generated.logprobs, prefilled.logprobs, strict=True))[first:]
        differences = [decoded - dense for decoded, dense in pairs]
        same = [decoded == dense for decoded, dense in zip(generated.top_ids, prefilled.top_ids, strict=True)][first:]
        largest = max(abs(difference) for difference in differences)
        return cls(prompt_tokens, len(pairs), mean(differences), largest, sum(same) / len(same), differences)


def summarise(scores: Sequence[PromptScore], first: int = 0) -> dict[str, Any]:
    """Totals over prompts, every token counting alike, and each prompt."""
    differences = [value for score in scores for value in score.differences]
    total = len(differences)
    return {
        "first_token": first,
        "tokens": total,
        "kl": mean(differences),
        "kl_standard_error": standard_error(scores),
        "max_difference": max(score.max_difference for score in scores),
        "agreement": sum(score.agreement * score.output_tokens for score in scores) / total,
        "kl_by_position": by_position(scores, first),
        "prompts": [{k: v for k, v in asdict(score).items() if k != "differences"} for score in scores],
    }


def standard_error(scores: Sequence[PromptScore]) -> float:
    """Of the mean KL: over prompts, whose tokens are not independent; over the tokens of the only one."""
    values = [score.kl for score in scores] if len(scores) > 1 else scores[0].differences
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def by_position(scores: Sequence[PromptScore], first: int) -> list[dict[str, Any]]:
    """Mean KL of every `BIN` output tokens, over prompts: what events did shows as steps."""
    bins: dict[int, list[float]] = {}
    for score in scores:
        for offset, difference in enumerate(score.differences):
            bins.setdefault((first + offset) // BIN * BIN, []).append(difference)
    return [{"token": start, "kl": mean(values), "tokens": len(values)} for start, values in sorted(bins.items())]


def describe(report: dict[str, Any]) -> str:
    """The report as text."""
    events, held = report["select_events"], report["held"]
    compressed = "no compression on this server" if events is None else f"{events} select events"
    lines = [
        f"{report['url']}: {len(report['prompts'])} prompts, {report['tokens']} tokens, {compressed}",
        f"KL(generation || dense prefill): {report['kl']:.5f} +- {report['kl_standard_error']:.5f} nats per token",
        f"largest log-probability difference: {report['max_difference']:.4f}",
        f"top-1 agreement: {100 * report['agreement']:.2f} %",
    ]
    if held is not None:
        lines.append(f"output pages held, of dense: {100 * held:.1f} % in the mean over time")
    if events == 0:
        lines.append("nothing was compressed: ask for more --tokens")
    for number, score in enumerate(report["prompts"], 1):
        lines.append(
            f"  prompt {number}: {score['prompt_tokens']} + {score['output_tokens']} tokens, KL {score['kl']:.5f}, "
            f"max {score['max_difference']:.4f}, top-1 {100 * score['agreement']:.2f} %"
        )
    return "\n".join(lines)
