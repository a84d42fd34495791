"""Run the fidelity benchmark: `python -m bench.fidelity [--quick]`."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import AutoTokenizer

from bench.fidelity.configurations import Configuration, full_sweep, quick_sweep
from bench.fidelity.documents import DOCUMENTS, Document
from bench.fidelity.needle import plant
from bench.fidelity.plots import draw_all
from bench.fidelity.report import write_report
from bench.fidelity.tasks import Text, result_path
from bench.fidelity.worker import Job, is_wanted, start_workers
from hardkv_sglang.cli.demo_model import cache_directory, demo_model_path

NEEDLE_FILLERS = ("novel", "python")
QUICK_DOCUMENTS = (DOCUMENTS[1], DOCUMENTS[4])
ROOT = Path(__file__).parents[2]


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line of the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m bench.fidelity", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two short documents, three configurations")
    parser.add_argument("--model", type=Path, help="folder of a Llama model (default: the demo model)")
    parser.add_argument("--prompt", type=int, metavar="N", help="tokens that are prefilled (default: 3072)")
    parser.add_argument("--decode", type=int, metavar="N", help="tokens that are decoded (default: 3072)")
    parser.add_argument("--documents", type=int, metavar="N", help="only the first N documents (default: all)")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes, one thread each (default: 2)")
    parser.add_argument("--work", type=Path, help="folder of resumable results (default: in the cache)")
    parser.add_argument("--results", type=Path, help="folder of the report's tables (default: bench/results)")
    parser.add_argument("--report-only", action="store_true", help="report the results that are there")
    return parser.parse_args(argv)


def load_texts(
    model: Path, prompt_len: int, decode_len: int, documents: Sequence[Document], fillers: Sequence[str]
) -> list[Text]:
    """Tokenised documents, then needle documents made of some of them."""
    tokenizer = AutoTokenizer.from_pretrained(model)

    def tokenize(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    cache = cache_directory() / "fidelity-texts"
    ids = {document.name: tokenize(document.read(cache)) for document in documents}
    size = prompt_len + decode_len + 1
    texts = [
        Text(document.name, number, torch.tensor(ids[document.name][:size]), prompt_len)
        for number, document in enumerate(documents)
    ]
    for number, filler in enumerate(fillers):
        # beyond what the plain document shows, so that no text is used twice
        tokens, spans = plant(ids[filler][size:], prompt_len // 2, decode_len * 3 // 4, tokenize)
        texts.append(Text(f"needle_{filler}", number, tokens, prompt_len // 2, spans))
    return texts


def show_progress(console: Console, jobs: Sequence[Job]) -> None:
    """Run the workers and show how far they are. Raises `RuntimeError` when one fails."""
    total = sum(len(job.pending()) for job in jobs)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    workers = start_workers(jobs)
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("documents x configurations", total=total)
        while any(worker.is_alive() for worker in workers):
            progress.update(task, completed=total - sum(len(job.pending()) for job in jobs))
            time.sleep(2)
        progress.update(task, completed=total - sum(len(job.pending()) for job in jobs))
    if any(worker.exitcode for worker in workers):
        raise RuntimeError("a worker failed; run the command again to resume")


def finished(
    folder: Path, texts: Sequence[Text], configurations: Sequence[Configuration]
) -> list[tuple[Configuration, Text, Path]]:
    """Tasks that have a result."""
    tasks = [(c, text, result_path(folder, text, c)) for c in configurations for text in texts if is_wanted(text, c)]
    return [task for task in tasks if task[2].exists()]


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, then write the report."""
    args = parse_arguments(argv)
    console = Console(highlight=False)
    model = args.model or demo_model_path()
    prompt_len, decode_len = args.prompt or (256 if args.quick else 3072), args.decode or (1536 if args.quick else 3072)
    folder = args.work or cache_directory() / "fidelity-results"
    folder.mkdir(parents=True, exist_ok=True)
    configurations = quick_sweep() if args.quick else full_sweep()
    documents = QUICK_DOCUMENTS if args.quick else DOCUMENTS[: args.documents]
    texts = load_texts(model, prompt_len, decode_len, documents, () if args.quick else NEEDLE_FILLERS)
    started = time.monotonic()
    if not args.report_only:
        jobs = [Job(model, texts[i :: args.jobs], configurations, folder) for i in range(args.jobs)]
        show_progress(console, jobs)
    command = shlex.join(["python", "-m", "bench.fidelity", *(sys.argv[1:] if argv is None else argv)])
    run = {"command": command, "seconds": round(time.monotonic() - started)}
    results = args.results or ROOT / "bench" / "results"
    name = "fidelity_quick" if args.quick else "fidelity"
    summary = write_report(console, ROOT, finished(folder, texts, configurations), run, results, name)
    if not args.quick:
        draw_all(ROOT / "docs" / "img", summary.points, summary.few, summary.plain)
    return 0


if __name__ == "__main__":
    sys.exit(main())
