"""`hardkv eval`: fidelity of any running SGLang server, measured from outside.

The server generates with log-probabilities, under compression if it compresses. Then it scores the same tokens in
a prefill, which is dense. On a server without compression the two agree up to rounding.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import requests

Subparsers = argparse._SubParsersAction

PROMPTS = (
    "Explain how to plan a vegetable garden, month by month, with many details.",
    "Tell a long story about a lighthouse keeper who learns to read the weather.",
    "Write a Python module that parses command line arguments, with documentation and examples.",
)
TIMEOUT_S = 1800.0


class EvalError(Exception):
    """The server cannot be asked, or its answer is not usable; the message says why."""


@dataclass(frozen=True)
class PromptScore:
    """One generated text. Log-probabilities are natural logarithms."""

    prompt_tokens: int
    output_tokens: int
    kl: float  # mean of log p(generation) - log p(prefill) over the sampled tokens
    max_difference: float  # largest absolute difference
    agreement: float  # share of tokens at which both have the same most likely token
    differences: list[float]  # token by token

    @classmethod
    def of(cls, prompt_tokens: int, generated: Scored, prefilled: Scored) -> PromptScore:
        """Compare two scorings of the same tokens."""
        pairs = list(zip(generated.logprobs, prefilled.logprobs, strict=True))
        differences = [decoded - dense for decoded, dense in pairs]
        same = [decoded == dense for decoded, dense in zip(generated.top_ids, prefilled.top_ids, strict=True)]
        largest = max(abs(difference) for difference in differences)
        return cls(prompt_tokens, len(pairs), mean(differences), largest, sum(same) / len(same), differences)


@dataclass(frozen=True)
class Scored:
    """Tokens with their log-probabilities and the most likely token at each place."""

    ids: list[int]
    logprobs: list[float]
    top_ids: list[int]


def add_parser(subparsers: Subparsers[argparse.ArgumentParser]) -> None:
    """Declare the subcommand."""
    text = "measure how far a running server's generation is from its own dense prefill"
    parser = subparsers.add_parser("eval", help=text, description=text)
    parser.add_argument("--url", required=True, help="server, for example http://127.0.0.1:30000")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--text", type=Path, metavar="FILE", help="one prompt: the whole file")
    source.add_argument("--prompts", type=Path, metavar="FILE", help="one prompt per line (default: three built in)")
    parser.add_argument(
        "--tokens", type=int, default=1024, metavar="N", help="tokens per prompt (default: %(default)s)"
    )
    parser.add_argument(
        "--temperature", type=float, default=1.0, metavar="T",
        help="only at 1, the default, is the mean difference an estimate of KL",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the result as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit status 0 when every prompt was measured, 2 when the server or a file cannot be used."""
    try:
        prompts = read_prompts(args.text, args.prompts)
        client = Client(args.url)
        before = client.select_events()
        scores = [evaluate(client, prompt, args.tokens, args.temperature) for prompt in prompts]
        after = client.select_events()
    except (EvalError, OSError) as error:
        print(f"hardkv eval: {error}", file=sys.stderr)
        return 2
    events = None if before is None or after is None else after - before
    report = {"url": args.url, "temperature": args.temperature, "select_events": events, **summarise(scores)}
    print(describe(report))
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def read_prompts(text: Path | None, prompts: Path | None) -> Sequence[str]:
    """Prompts of the files, or the built-in ones. Raises `EvalError` for an empty file."""
    if text is None and prompts is None:
        return PROMPTS
    path = text or prompts
    assert path is not None
    content = path.read_text()
    found = [content] if text else [line for line in content.splitlines() if line.strip()]
    if not any(prompt.strip() for prompt in found):
        raise EvalError(f"{path} has no prompt")
    return found


class Client:
    """What is asked of the server."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def generate(self, **payload: Any) -> dict[str, Any]:
        """Reply of `/generate`. Raises `EvalError`."""
        return self._ask("POST", "/generate", json={"return_logprob": True, "top_logprobs_num": 1, **payload})

    def select_events(self) -> int | None:
        """Select events since the server started; None where it does not compress."""
        states = self._ask("GET", "/server_info").get("internal_states") or [{}]
        return states[0].get("hardkv", {}).get("select_events")

    def _ask(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        try:
            response = requests.request(method, self.url + path, timeout=TIMEOUT_S, **options)
            response.raise_for_status()
            return response.json()
        except requests.RequestException as error:
            raise EvalError(f"{method} {self.url}{path}: {error}") from error


def evaluate(client: Client, prompt: str, num_tokens: int, temperature: float) -> PromptScore:
    """Generate from a prompt, then score the same tokens densely."""
    sampling = {"temperature": temperature, "max_new_tokens": num_tokens, "ignore_eos": True}
    reply = client.generate(text=prompt, sampling_params=sampling, logprob_start_len=0)
    meta = reply["meta_info"]
    prompt_ids = [entry[1] for entry in meta["input_token_logprobs"]]
    generated = scored(meta["output_token_logprobs"], meta["output_top_logprobs"])
    # no option for no new token: the one more is not looked at
    again = client.generate(
        input_ids=prompt_ids + generated.ids,
        sampling_params={"temperature": 0, "max_new_tokens": 1},
        logprob_start_len=len(prompt_ids) - 1,
    )
    # the first entry is the last prompt token, which nothing before it scores
    meta = again["meta_info"]
    prefilled = scored(meta["input_token_logprobs"][1:], meta["input_top_logprobs"][1:])
    if prefilled.ids != generated.ids:
        raise EvalError("the server scored other tokens than it generated")
    return PromptScore.of(len(prompt_ids), generated, prefilled)


def scored(entries: Iterable[Any], tops: Iterable[Any]) -> Scored:
    """Read SGLang's lists of (log-probability, token, text)."""
    entries = list(entries)
    return Scored([e[1] for e in entries], [e[0] for e in entries], [top[0][1] for top in tops])


def summarise(scores: Sequence[PromptScore]) -> dict[str, Any]:
    """Totals over prompts, every token counting alike, and each prompt."""
    differences = [value for score in scores for value in score.differences]
    total = len(differences)
    error = stdev(differences) / math.sqrt(total) if total > 1 else 0.0
    return {
        "tokens": total,
        "kl": mean(differences),
        "kl_standard_error": error,
        "max_difference": max(score.max_difference for score in scores),
        "agreement": sum(score.agreement * score.output_tokens for score in scores) / total,
        "prompts": [{k: v for k, v in asdict(score).items() if k != "differences"} for score in scores],
    }


def describe(report: dict[str, Any]) -> str:
    """The report as text."""
    events = report["select_events"]
    compressed = "no compression on this server" if events is None else f"{events} select events"
    lines = [
        f"{report['url']}: {len(report['prompts'])} prompts, {report['tokens']} tokens, {compressed}",
        f"KL(generation || dense prefill): {report['kl']:.5f} +- {report['kl_standard_error']:.5f} nats per token",
        f"largest log-probability difference: {report['max_difference']:.4f}",
        f"top-1 agreement: {100 * report['agreement']:.2f} %",
    ]
    if events == 0:
        lines.append("nothing was compressed: ask for more --tokens")
    for number, score in enumerate(report["prompts"], 1):
        lines.append(
            f"  prompt {number}: {score['prompt_tokens']} + {score['output_tokens']} tokens, KL {score['kl']:.5f}, "
            f"max {score['max_difference']:.4f}, top-1 {100 * score['agreement']:.2f} %"
        )
    return "\n".join(lines)
