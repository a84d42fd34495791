"""KL and agreement against held bytes for whole sets of options, on a GPU: `python -m bench.fidelity.frontier`.

    python -m bench.fidelity.frontier --model FOLDER --texts documents.json generated.json --out results/model.jsonl
    python -m bench.fidelity.frontier --report results/*.jsonl --results bench/results --name fidelity_frontier

Every text is decoded teacher-forced through planner, events, tables, pool and, on a GPU, the kernels of a server. A
line is written as soon as a text is done, so that a run may be cut off at any time and goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.fidelity.frontier_points import Point, frontier_points
from bench.fidelity.frontier_report import write_frontier
from bench.fidelity.model import BlockModel
from bench.fidelity.quantised import QUANTISATIONS, QuantisedCache
from bench.fidelity.scores import Reference, TokenScores
from bench.fidelity.session import PAGE_SIZE, CompressedSession
from bench.fidelity.tasks import Text, answer_scores, score_blocks
from bench.fidelity.texts import read_texts
from bench.fidelity.tri import QueryStatistics, TriScorer

NOT_SCORED = 640  # first decoded tokens, in KL and in bytes: most points have had no event by then
BIN, NUM_BINS = 64, 8  # tokens since the last select event


@dataclass(frozen=True)
class Worker:
    """What one process does: its texts, through all points."""

    model_folder: Path
    device: str
    dtype: str
    texts: Sequence[Text]
    points: Sequence[Point]
    out: Path
    until: float  # time of day, in seconds since 1970

    def run(self) -> None:
        """Body of the process."""
        torch.set_num_threads(1)
        done = {(line["point"], line["text"]) for line in read_lines(self.out)}
        model = BlockModel(self.model_folder, self.device, getattr(torch, self.dtype))
        references = [Reference.build(model, text.tokens.to(model.device), text.prompt_len) for text in self.texts]
        with self.out.open("a") as file:
            for point in self.points:
                for text, reference in zip(self.texts, references, strict=True):
                    if time.time() > self.until:
                        return
                    if (point.name, text.name) not in done:
                        line = {"point": point.name, "family": point.family, "text": text.name}
                        file.write(json.dumps(line | measure(model, reference, text, point)) + "\n")
                        file.flush()


@torch.inference_mode()
def measure(model: BlockModel, reference: Reference, text: Text, point: Point) -> dict[str, Any]:
    """One point on one text."""
    started = time.perf_counter()
    if point.quantisation is not None:
        found = measure_quantised(model, reference, text, point.quantisation)
    else:
        found = measure_compressed(model, reference, text, point)
    return found | {"seconds": round(time.perf_counter() - started, 2)}


def measure_quantised(model: BlockModel, reference: Reference, text: Text, name: str) -> dict[str, Any]:
    """All KV rounded, nothing dropped."""
    quantisation = QUANTISATIONS[name]
    cache = QuantisedCache(model.shape, len(reference.tokens) - 1, model.device, quantisation)
    hidden, _ = Reference.forward(model, reference.tokens, cache)
    targets = reference.tokens[reference.prompt_len + 1 :]
    scores = TokenScores.of_hidden(model, reference.hidden, hidden[reference.prompt_len :], targets)
    held = {"held": quantisation.held, "held_end": quantisation.held}
    return summarise_scores(scores) | recall(scores, text) | held


def measure_compressed(model: BlockModel, reference: Reference, text: Text, point: Point) -> dict[str, Any]:
    """Decoded under the point's options."""
    session = CompressedSession(model.shape, point.config, len(text.tokens), device=model.device)
    if point.by_query_centres:
        statistics = QueryStatistics.of_text(model, reference.tokens)
        session.executor.scorer = TriScorer(session.executor.reader, statistics)
    session.prefill(reference.cache, text.prompt_len)
    scores = score_blocks(model, reference, session)
    session.release()
    found = summarise_scores(scores) | recall(scores, text) | held_share(session, text.prompt_len)
    return found | {"kl_since_event": kl_since_event(scores.kl.tolist(), session), "events": len(session.selected)}


def summarise_scores(scores: TokenScores) -> dict[str, float]:
    """Means over the scored tokens."""
    kl = scores.kl[NOT_SCORED:]
    surprise = scores.compressed_nll[NOT_SCORED:] - scores.dense_nll[NOT_SCORED:]
    return {
        "kl": float(kl.mean()),
        "kl_p99": float(kl.quantile(0.99)),
        "agreement": float(scores.agrees[NOT_SCORED:].float().mean()),
        "extra_nll": float(surprise.mean()),
        "dense_nll": float(scores.dense_nll[NOT_SCORED:].mean()),
    }


def recall(scores: TokenScores, text: Text) -> dict[str, Any]:
    """Answers of a text with facts, and how many of those that the dense model has right are still right."""
    answers = [answer for answer in answer_scores(scores, text) if answer["dense_correct"]]
    if not text.spans:
        return {}
    right = sum(answer["compressed_correct"] for answer in answers)
    return {"answers": len(text.spans), "dense_right": len(answers), "still_right": right}


def held_share(session: CompressedSession, prompt_len: int) -> dict[str, float]:
    """Token pages of the output, recent window and sparse span included, over those of dense KV.

    held: sums over the scored tokens, so the mean over time of what the request holds; held_end: at the last one.
    """
    prompt_pages = -(-prompt_len // PAGE_SIZE)
    pairs = [
        (holding.held_pages - prompt_pages, -(-(holding.position + 1) // PAGE_SIZE) - prompt_pages)
        for holding in session.holdings[NOT_SCORED:]
    ]
    held, dense = (sum(pages) for pages in zip(*pairs, strict=True))
    return {"held": held / dense, "held_end": pairs[-1][0] / pairs[-1][1]}


def kl_since_event(kl: Sequence[float], session: CompressedSession) -> list[float | None]:
    """Mean KL by tokens since the last select event, in bins of `BIN`; the last one takes all that is later."""
    sums, counts, last = [0.0] * NUM_BINS, [0] * NUM_BINS, None
    events = iter(session.selected)
    upcoming = next(events, None)
    for value, holding in zip(kl, session.holdings, strict=True):
        while upcoming is not None and upcoming.seq_len <= holding.position:
            last, upcoming = upcoming.seq_len, next(events, None)
        if last is not None:
            place = min((holding.position - last) // BIN, NUM_BINS - 1)
            sums[place], counts[place] = sums[place] + value, counts[place] + 1
    return [total / count if count else None for total, count in zip(sums, counts, strict=True)]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Results that a file holds; none if there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run_workers(workers: Sequence[Worker]) -> None:
    """One process each. Raises `RuntimeError` when one fails."""
    context = torch.multiprocessing.get_context("spawn")
    run: Callable[[Worker], None] = Worker.run
    processes = [context.Process(target=run, args=(worker,)) for worker in workers]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise RuntimeError("a worker failed; run the command again to resume")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.fidelity.frontier", description=__doc__)
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="a Llama or Qwen2 model")
    parser.add_argument("--texts", type=Path, nargs="+", default=[], metavar="FILE", help="of bench.fidelity.texts")
    parser.add_argument("--device", default="cuda", help="default: cuda")
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16"), help="of weights; attention: float32"
    )
    parser.add_argument("--points", metavar="PART", help="only points whose name contains this")
    parser.add_argument("--jobs", type=int, default=8, help="processes, which share the GPU (default: 8)")
    parser.add_argument("--seconds", type=float, default=1e9, help="start nothing after so long")
    parser.add_argument("--out", type=Path, metavar="FILE", help="results; each process adds its number to the name")
    parser.add_argument("--report", type=Path, nargs="+", metavar="FILE", help="results to report instead of a run")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="where the report goes")
    parser.add_argument("--name", default="fidelity_frontier", help="of the report's files")
    args = parser.parse_args(argv)
    if args.report is None and not (args.model and args.texts and args.out):
        parser.error("a run needs --model, --texts and --out; a report needs --report")
    if args.report is not None and args.results is None:
        parser.error("--report needs --results")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, or report."""
    args = parse_arguments(argv)
    if args.report is not None:
        write_frontier({path.stem: read_lines(path) for path in args.report}, args.results, args.name)
        return 0
    texts = read_texts(args.texts)
    points = [point for point in frontier_points() if args.points is None or args.points in point.name]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    jobs = min(args.jobs, len(texts))
    files = [args.out.with_suffix(f".{number}.jsonl") for number in range(jobs)]
    until = time.time() + args.seconds
    parts = [(texts[number::jobs], file) for number, file in enumerate(files)]
    run_workers([Worker(args.model, args.device, args.dtype, part, points, file, until) for part, file in parts])
    args.out.write_text("".join(file.read_text() for file in files if file.exists()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
