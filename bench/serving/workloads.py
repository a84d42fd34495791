"""Named workloads: what `sglang.benchmark.serving` is asked to send."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class RandomPrompts:
    """Random token ids, generated from the seed alone: SGLang's `random` data set would download ShareGPT."""

    prompt_len: int  # tokens, the longest
    output_len: int  # tokens, the longest
    shortest: float = 1.0  # lengths are uniform between this fraction and 1 of the longest

    def arguments(self, num_requests: int) -> list[str]:
        """Arguments of the client."""
        return [
            "--dataset-name=random-ids",
            "--tokenize-prompt",  # token ids are sent, so prompts have exactly the length that is asked for
            f"--num-prompts={num_requests}",
            f"--random-input-len={self.prompt_len}",
            f"--random-output-len={self.output_len}",
            f"--random-range-ratio={self.shortest}",
        ]


@dataclass(frozen=True)
class SharedPrefix:
    """SGLang's generated-shared-prefix data set: groups of requests with one long system prompt each."""

    groups: int
    system_len: int  # tokens
    question_len: int  # tokens
    output_len: int  # tokens

    def arguments(self, num_requests: int) -> list[str]:
        """Arguments of the client; the number of requests is a multiple of the groups."""
        return [
            "--dataset-name=generated-shared-prefix",
            f"--num-prompts={num_requests}",
            f"--gsp-num-groups={self.groups}",
            f"--gsp-prompts-per-group={num_requests // self.groups}",
            f"--gsp-system-prompt-len={self.system_len}",
            f"--gsp-question-len={self.question_len}",
            f"--gsp-output-len={self.output_len}",
            # SGLang caches generated prompts in the home directory under a key that does not name the tokenizer;
            # with this header, which a single server ignores, it does not
            "--gsp-send-routing-key",
        ]


@dataclass(frozen=True)
class Workload:
    """Requests from clients that each wait for their answer before they send the next."""

    name: str
    meaning: str
    dataset: RandomPrompts | SharedPrefix
    concurrency: tuple[int, ...]  # clients; one measurement for each number
    waves: int  # requests that each client sends

    def scaled(self, factor: float) -> Workload:
        """The workload for a pool that is `factor` times as large: so many times the clients."""
        smallest = self.dataset.groups if isinstance(self.dataset, SharedPrefix) else 1
        return self.with_concurrency([max(smallest, round(clients * factor)) for clients in self.concurrency])

    def with_concurrency(self, concurrency: Sequence[int]) -> Workload:
        """The workload with other numbers of clients."""
        return replace(self, concurrency=tuple(dict.fromkeys(concurrency)))

    def num_requests(self, clients: int) -> int:
        """Requests of one measurement."""
        total = clients * self.waves
        if isinstance(self.dataset, SharedPrefix):
            return max(total // self.dataset.groups, 1) * self.dataset.groups
        return total

    def arguments(self, clients: int) -> list[str]:
        """Arguments of the client for one measurement."""
        return [*self.dataset.arguments(self.num_requests(clients)), f"--max-concurrency={clients}"]


def select(workloads: Sequence[Workload], names: Sequence[str]) -> list[Workload]:
    """The workloads with these names, all if none is given. Raises `ValueError` naming the known ones."""
    known = {workload.name: workload for workload in workloads}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"no workload {', '.join(unknown)}; this preset has: {', '.join(known)}")
    return [known[name] for name in names] if names else list(workloads)
