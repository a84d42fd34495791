"""One measurement, and the file that remembers it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.serving.systems import System
from bench.serving.workloads import Workload


@dataclass(frozen=True)
class Cell:
    """One workload with one number of clients on one system, once."""

    model: str
    system: System
    workload: Workload
    clients: int
    round: int

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.system.name}, {self.workload.name}, {self.clients} clients, round {self.round + 1}"

    @property
    def stem(self) -> str:
        """File name without its ending."""
        return f"{self.system.name}_{self.workload.name}_c{self.clients}_r{self.round}"

    def identity(self) -> dict[str, Any]:
        """What a result must have been measured with to count for this cell."""
        return {
            "model": self.model,
            "flags": dict(self.system.flags),
            "arguments": self.workload.arguments(self.clients),
        }

    def save(self, folder: Path, result: dict[str, Any]) -> None:
        """Remember a result; an interrupted write leaves none."""
        partial = folder / f"{self.stem}.partial"
        partial.write_text(json.dumps({"identity": self.identity(), **result}))
        partial.replace(folder / f"{self.stem}.json")

    def load(self, folder: Path) -> dict[str, Any] | None:
        """The result, or None if there is none of these flags and arguments."""
        path = folder / f"{self.stem}.json"
        if not path.is_file():
            return None
        result: dict[str, Any] = json.loads(path.read_text())
        return result if result["identity"] == self.identity() else None


def plan_cells(model: str, systems: Sequence[System], workloads: Sequence[Workload], rounds: int) -> list[list[Cell]]:
    """Cells in the order of a run, grouped by server start.

    Systems alternate, and each round starts with another one, so that a drift of the machine favours none.
    """
    groups = []
    for number in range(rounds):
        first = number % len(systems)
        for system in [*systems[first:], *systems[:first]]:
            groups.append([Cell(model, system, w, clients, number) for w in workloads for clients in w.concurrency])
    return groups
