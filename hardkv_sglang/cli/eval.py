"""`hardkv eval`: fidelity of any running SGLang server, measured from outside.

The server generates with log-probabilities, under compression if it compresses. Then it scores the same tokens in
a prefill, which is dense. On a server without compression the two agree up to rounding. All prompts are generated
before any is scored, so that what is held meanwhile is what generation holds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import requests
from tqdm import tqdm

from hardkv_sglang.cli.eval_held import HeldWatch
from hardkv_sglang.cli.eval_scores import PromptScore, Scored, describe, summarise

Subparsers = argparse._SubParsersAction

PROMPTS = (
    "Explain how to plan a vegetable garden, month by month, with many details.",
    "Tell a long story about a lighthouse keeper who learns to read the weather.",
    "Write a Python module that parses command line arguments, with documentation and examples.",
)
TIMEOUT_S = 1800.0


Prompt = str | list[int]
Result = TypeVar("Result")


class EvalError(Exception):
    """The server cannot be asked, or its answer is not usable; the message says why."""


@dataclass(frozen=True)
class Generated:
    """A prompt as the server tokenised it, and what it sampled behind it."""

    prompt_ids: list[int]
    output: Scored


def add_parser(subparsers: Subparsers[argparse.ArgumentParser]) -> None:
    """Declare the subcommand."""
    text = "measure how far a running server's generation is from its own dense prefill"
    parser = subparsers.add_parser("eval", help=text, description=text)
    parser.add_argument("--url", required=True, help="server, for example http://127.0.0.1:30000")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--text", type=Path, metavar="FILE", help="one prompt: the whole file")
    source.add_argument(
        "--prompts", type=Path, metavar="FILE",
        help="one prompt per line; or, in a .json file, a list of texts or of token id lists (default: three built in)",
    )  # fmt: skip
    parser.add_argument(
        "--tokens", type=int, default=1024, metavar="N", help="tokens per prompt (default: %(default)s)"
    )
    parser.add_argument(
        "--first", type=int, default=0, metavar="N",
        help="first generated token that counts; those before the first event differ by rounding only (default: 0)",
    )  # fmt: skip
    parser.add_argument(
        "--concurrency", type=int, default=8, metavar="N", help="requests at a time (default: %(default)s)"
    )
    parser.add_argument(
        "--temperature", type=float, default=1.0, metavar="T",
        help="only at 1, the default, is the mean difference an estimate of KL",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the result as JSON")
    parser.add_argument(
        "--texts", type=Path, metavar="FILE",
        help="write what was generated as JSON: token ids with both log-probabilities of the output",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit status 0 when every prompt was measured, 2 when the server or a file cannot be used."""
    try:
        check_numbers(args)
        prompts = read_prompts(args.text, args.prompts)
        report, texts = measure(Client(args.url), prompts, args)
    except (EvalError, OSError) as error:
        print(f"hardkv eval: {error}", file=sys.stderr)
        return 2
    print(describe(report))
    if args.texts:
        args.texts.write_text(json.dumps(texts))
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def check_numbers(args: argparse.Namespace) -> None:
    """Raises `EvalError` naming the option that is out of range."""
    if not 0 <= args.first < args.tokens:
        raise EvalError(f"--first {args.first} leaves no token: it must be from 0 to {args.tokens - 1} (--tokens)")
    if args.concurrency < 1:
        raise EvalError(f"--concurrency must be at least 1, not {args.concurrency}")


def measure(
    client: Client, prompts: Sequence[Prompt], args: argparse.Namespace
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The report, and the texts. Raises `EvalError`."""
    before = client.select_events()
    with HeldWatch(client.url, args.first, client.page_size()) as watch:
        sampling = {"temperature": args.temperature, "max_new_tokens": args.tokens, "ignore_eos": True}
        generated = in_parallel(
            "generating", client.generate, args.concurrency, [(prompt, sampling) for prompt in prompts]
        )
    after = client.select_events()
    dense = in_parallel(
        "scoring", client.score, args.concurrency, [(text.prompt_ids, text.output.ids) for text in generated]
    )
    scores = [
        PromptScore.of(len(text.prompt_ids), text.output, scored, args.first)
        for text, scored in zip(generated, dense, strict=True)
    ]
    events = None if before is None or after is None else after - before
    report = {"url": client.url, "temperature": args.temperature, "select_events": events}
    texts = [text_entry(*both) for both in zip(generated, dense, strict=True)]
    return {**report, **summarise(scores, args.first), **watch.report()}, texts


def text_entry(text: Generated, dense: Scored) -> dict[str, Any]:
    """One generated text, for other programs; the prompt's tokens first."""
    tokens = text.prompt_ids + text.output.ids
    logprobs = {"generated_logprobs": text.output.logprobs, "prefilled_logprobs": dense.logprobs}
    return {"prompt_len": len(text.prompt_ids), "tokens": tokens, **logprobs}


def read_prompts(text: Path | None, prompts: Path | None) -> Sequence[Prompt]:
    """Prompts of the files, or the built-in ones. Raises `EvalError` for an empty or unusable file."""
    if text is None and prompts is None:
        return PROMPTS
    path = text or prompts
    assert path is not None
    content = path.read_text()
    found: list[Prompt] = [content] if text else [line for line in content.splitlines() if line.strip()]
    if prompts and path.suffix == ".json":
        found = json_prompts(path, content)
    if not any(prompt.strip() if isinstance(prompt, str) else prompt for prompt in found):
        raise EvalError(f"{path} has no prompt")
    return found


def json_prompts(path: Path, content: str) -> list[Prompt]:
    """A list of texts or of lists of token ids. Raises `EvalError`."""
    try:
        found = json.loads(content)
    except ValueError as error:
        raise EvalError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, list) or not all(isinstance(prompt, str) or is_ids(prompt) for prompt in found):
        raise EvalError(f"{path} must be a list of texts or of lists of token ids")
    return found


def is_ids(prompt: Any) -> bool:
    """Whether this is a list of token ids."""
    return isinstance(prompt, list) and bool(prompt) and all(type(token) is int for token in prompt)


def in_parallel(
    label: str, call: Callable[..., Result], concurrency: int, calls: Sequence[tuple[Any, ...]]
) -> list[Result]:
    """Results of all calls, in order, with a progress bar. Raises the first `EvalError`."""
    with ThreadPoolExecutor(concurrency) as threads:
        futures = [threads.submit(call, *arguments) for arguments in calls]
        try:
            for future in tqdm(as_completed(futures), label, total=len(futures), unit="prompt"):
                future.result()
        except EvalError:
            threads.shutdown(wait=False, cancel_futures=True)
            raise
    return [future.result() for future in futures]


class Client:
    """What is asked of the server."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def generate(self, prompt: Prompt, sampling: dict[str, Any]) -> Generated:
        """Sample from a prompt, with log-probabilities. Raises `EvalError`."""
        source = {"text": prompt} if isinstance(prompt, str) else {"input_ids": prompt}
        meta = self._generate(**source, sampling_params=sampling, logprob_start_len=0)
        prompt_ids = [entry[1] for entry in meta["input_token_logprobs"]]
        output = Scored.of(meta["output_token_logprobs"], meta["output_top_logprobs"])
        if len(output.ids) < sampling["max_new_tokens"]:
            raise EvalError(f"the server ended an output after {len(output.ids)} tokens; ask for fewer with --tokens")
        return Generated(prompt_ids, output)

    def score(self, prompt_ids: list[int], output_ids: list[int]) -> Scored:
        """Score these output tokens in one prefill. Raises `EvalError`."""
        # no option for no new token: the one more is not looked at
        meta = self._generate(
            input_ids=prompt_ids + output_ids,
            sampling_params={"temperature": 0, "max_new_tokens": 1},
            logprob_start_len=len(prompt_ids) - 1,
        )
        # the first entry is the last prompt token, which nothing before it scores
        scored = Scored.of(meta["input_token_logprobs"][1:], meta["input_top_logprobs"][1:])
        if scored.ids != output_ids:
            raise EvalError("the server scored other tokens than it generated")
        return scored

    def _generate(self, **payload: Any) -> dict[str, Any]:
        options = {"return_logprob": True, "top_logprobs_num": 1}
        meta: dict[str, Any] = self._ask("POST", "/generate", json={**options, **payload})["meta_info"]
        return meta

    def select_events(self) -> int | None:
        """Select events since the server started; None where it does not compress."""
        states = self._ask("GET", "/server_info").get("internal_states") or [{}]
        return states[0].get("hardkv", {}).get("select_events")

    def page_size(self) -> int:
        """Tokens of a token page."""
        return int(self._ask("GET", "/server_info")["page_size"])

    def _ask(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        try:
            response = requests.request(method, self.url + path, timeout=TIMEOUT_S, **options)
            response.raise_for_status()
            return response.json()
        except requests.RequestException as error:
            raise EvalError(f"{method} {self.url}{path}: {error}") from error
