"""Worker processes: each owns some documents and takes them through the configurations in order."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.fidelity.configurations import Configuration
from bench.fidelity.model import BlockModel
from bench.fidelity.scores import Reference
from bench.fidelity.tasks import Text, result_path, run_task, write_result
from hardkv_sglang.events import scoring


@dataclass(frozen=True)
class Job:
    """What one worker process does."""

    model_folder: Path
    texts: Sequence[Text]
    configurations: Sequence[Configuration]
    folder: Path  # results

    def pending(self) -> list[tuple[Text, Configuration]]:
        """Tasks without a result, configuration by configuration."""
        tasks = [(text, configuration) for configuration in self.configurations for text in self.texts]
        return [(text, c) for text, c in tasks if is_wanted(text, c) and not result_path(self.folder, text, c).exists()]


def is_wanted(text: Text, configuration: Configuration) -> bool:
    """Needle documents are for the configurations that ask for them, others for all."""
    if text.spans:
        return configuration.needle
    return configuration.num_documents is None or text.number < configuration.num_documents


def run_job(job: Job) -> None:
    """Body of a worker process. One thread: two processes share two cores better than two threads do."""
    torch.set_num_threads(1)
    # the same numbers, layer by layer instead of all at once: two gigabytes less
    scoring.MAX_ELEMENTS_PER_CHUNK = 1 << 22
    pending = job.pending()
    if not pending:
        return
    model = BlockModel(job.model_folder)
    references: dict[str, Reference] = {}
    for text, configuration in pending:
        if text.name not in references:
            references[text.name] = Reference.build(model, text.tokens, text.prompt_len)
        result = run_task(model, references[text.name], text, configuration)
        write_result(result_path(job.folder, text, configuration), result)


def start_workers(jobs: Sequence[Job]) -> Sequence[multiprocessing.process.BaseProcess]:
    """Start one process per job."""
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=run_job, args=(job,)) for job in jobs]
    for worker in workers:
        worker.start()
    return workers
