"""KL of survivors in fewer bits, on real texts: what number format they need. `python -m bench.fidelity.survivors`

Formats round what condense events copy for the first time, in pages of 16 bits, so that all keep the same tokens.
`stored 8` and `stored 4` are the server's own, `survivor_bits`, packed: lists also fill the larger head pages.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from bench.fidelity.__main__ import load_texts
from bench.fidelity.documents import DOCUMENTS
from bench.fidelity.model import BlockModel
from bench.fidelity.scores import Reference, TokenScores
from bench.fidelity.session import CompressedSession
from bench.fidelity.survivor_formats import RoundingSession, RowFormat, SurvivorFormat
from bench.fidelity.tasks import Text, score_blocks
from hardkv_sglang.cli.demo_model import demo_model_path
from hardkv_sglang.config import HardKVConfig

BLOCK = 512  # decoded tokens that are averaged
POOL, VALUES = RowFormat(), RowFormat(4)
ROOT = RowFormat(4, centred=True, power=0.5, rotated=True)
FORMATS = (
    SurvivorFormat("16", POOL, POOL),
    SurvivorFormat("K 8 by token, V 4", RowFormat(8), VALUES),
    SurvivorFormat("K 4 by token, V 4", RowFormat(4), VALUES),
    SurvivorFormat("K 4 rotated, V 4", RowFormat(4, rotated=True), VALUES),
    SurvivorFormat("K 4 by channel (KIVI), V 4", RowFormat(4, by_channel=True), VALUES),
    SurvivorFormat("K 4 centred rotated, V 4", RowFormat(4, centred=True, rotated=True), VALUES),
    SurvivorFormat("K 4 scaled rotated, V 4", replace(ROOT, power=1.0), VALUES),
    SurvivorFormat("K 4 root, V 4", replace(ROOT, rotated=False), VALUES),
    SurvivorFormat("K 4 root rotated, V 4", ROOT, VALUES),
    SurvivorFormat("K 4 root rotated of all, V 4", replace(ROOT, reference="all"), VALUES),
    SurvivorFormat("K 4 as stored, V 4", replace(ROOT, reference="all", as_stored=True), VALUES),
    SurvivorFormat("K 4 root rotated of prompt, V 4", replace(ROOT, reference="prompt"), VALUES),
    SurvivorFormat("K 4 root rotated of all, V 16", replace(ROOT, reference="all"), POOL),
    SurvivorFormat("K 4 root rotated of all, V 4 rotated", replace(ROOT, reference="all"), RowFormat(4, rotated=True)),
)
STORED = {"stored 8": 8, "stored 4": 4}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    names = [form.name for form in FORMATS] + list(STORED)
    parser = argparse.ArgumentParser(prog="python -m bench.fidelity.survivors", description=__doc__)
    parser.add_argument("--model", type=Path, help="folder of a Llama or Qwen2 model (default: the demo model)")
    parser.add_argument("--prompt", type=int, default=512, metavar="N", help="tokens that are prefilled")
    parser.add_argument("--decode", type=int, default=1024, metavar="N", help="tokens that are decoded")
    parser.add_argument("--documents", nargs="+", default=["python"], choices=[d.name for d in DOCUMENTS])
    parser.add_argument("--options", type=json.loads, default={}, help="of --kv-compression-config, as JSON")
    parser.add_argument("--formats", nargs="+", default=names, choices=names)
    return parser.parse_args(argv)


def open_session(name: str, model: BlockModel, options: HardKVConfig, max_len: int) -> CompressedSession:
    """A session whose survivors have the format of that name."""
    if name in STORED:
        return CompressedSession(model.shape, options.with_options(survivor_bits=STORED[name]), max_len)
    form = next(form for form in FORMATS if form.name == name)
    return RoundingSession(form, model.shape, options, max_len)


def describe(scores: TokenScores, session: CompressedSession) -> str:
    """KL and agreement from the first condense event on, KL by position, tokens and pages held."""
    holdings = session.holdings
    reached = torch.tensor([holding.condensed_end > session.state.prefix_end for holding in holdings])
    kl, agrees = scores.kl[reached], scores.agrees[reached]
    blocks = " ".join(f"{float(part.mean()):.5f}" for part in scores.kl.split(BLOCK))
    kept = sum(session.selected[-1].counts) / session.cfg.layout.columns
    return (
        f"KL {float(kl.mean()):.5f} (by {BLOCK}: {blocks}) top-1 {100 * float(agrees.double().mean()):.2f} % of "
        f"{len(kl)}; at the end {kept:.0f} kept of {session.selected[-1].candidates}, "
        f"{holdings[-1].condensed_pages} pages for {(holdings[-1].condensed_end - session.state.prefix_end) // 32}"
    )


def run(model: BlockModel, text: Text, args: argparse.Namespace) -> None:
    """Print a line per format."""
    reference = Reference.build(model, text.tokens, text.prompt_len)
    # condensing without a gain in pages, too: rounding is what is looked at
    options = HardKVConfig(**{"min_freed_pages": 0, **args.options})
    for name in args.formats:
        started = time.perf_counter()
        session = open_session(name, model, options, len(text.tokens))
        with torch.inference_mode():
            session.prefill(reference.cache, text.prompt_len)
            scores = score_blocks(model, reference, session)
        print(f"{name:38s} {describe(scores, session)}; {time.perf_counter() - started:.0f} s", flush=True)
        session.release()


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table per document."""
    args = parse_arguments(argv)
    torch.set_num_threads(1)
    folder = args.model or demo_model_path()
    model = BlockModel(folder)
    documents = [document for document in DOCUMENTS if document.name in args.documents]
    for text in load_texts(folder, args.prompt, args.decode, documents, ()):
        print(f"{folder.name}, {text.name}, {args.prompt} + {text.decode_len} tokens, {json.dumps(args.options)}")
        run(model, text, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
