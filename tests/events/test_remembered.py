"""What tokens remember of earlier select events, against a dictionary that knows every token by its position."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field

import pytest
import torch
from test_executor import OPTIONS, ROW, H, Simulation, everything_on_the_device

from hardkv_sglang.events.scoring import Scorer, TorchScorer, make_scorer
from hardkv_sglang.lifecycle.step_plan import SelectOp
from hardkv_sglang.selection.importance import measure_importance
from hardkv_sglang.selection.top_p import Scored

__all__ = ["everything_on_the_device"]
REMEMBERING = OPTIONS.with_options(recent_tokens=96, remembered_weight=0.75, prior_weight=0.1, top_p=0.8)


@dataclass(frozen=True)
class RememberedByPosition(TorchScorer):
    """Measures by itself, blends in a dictionary, and compares with what the scorer under test makes of it."""

    tested: Scorer
    simulation: Simulation
    energy: dict[tuple[int, int, int], float] = field(default_factory=dict)  # by layer, KV head and position
    blended: list[tuple[int, int, int]] = field(default_factory=list)

    def score_layers(self, op: SelectOp, layers: slice) -> Scored:
        found = self.reader.candidates(op, layers)
        measured = measure_importance(found, "mean", "mean").mean_square.double()
        scored = self.tested.score_layers(op, layers)
        assert scored.valid.shape[1] == op.num_candidates
        for b, row in enumerate(scored.importance.mean_square.double()):
            layer, head = layers.start + b // H, b % H
            for column, position in self.entries(op, layer, head):
                key, now = (layer, head, position), float(measured[b, column])
                if key in self.energy:
                    now = 0.75 * self.energy[key] + 0.25 * now
                    self.blended.append(key)
                self.energy[key] = now
                if column < op.num_candidates:
                    assert float(row[column]) == pytest.approx(now, rel=3e-2, abs=1e-9), (key, column)
        return scored

    def entries(self, op: SelectOp, layer: int, head: int) -> list[tuple[int, int]]:
        """Columns and positions of everything that the event measures in one list."""
        kept = self.simulation.attended[op.prefix_end : op.condensed_end, layer, head].nonzero()[:, 0]
        condensed = (kept + op.prefix_end).tolist()
        first = op.condensed_list_bound - len(condensed)
        dense = range(op.condensed_end, op.scanned_end)
        return [*enumerate(condensed, first), *enumerate(dense, op.condensed_list_bound)]


@pytest.mark.parametrize(
    "options",
    [{}, {"condense_interval": 32}, {"recent_tokens": 32}, {"max_tokens": 64}, {"query_window": 8}],
    ids=str,
)
def test_every_token_remembers_what_it_was(options: dict[str, object]) -> None:
    simulation = Simulation(REMEMBERING.with_options(**options), guard=nullcontext)
    scorer = RememberedByPosition(simulation.executor.reader, make_scorer(simulation.executor.reader), simulation)
    simulation.executor.scorer = scorer
    simulation.run(33, 290)
    assert simulation.condenses >= 2
    assert len(scorer.blended) > 500


def test_recent_tokens_are_measured_before_they_are_candidates() -> None:
    simulation = Simulation(REMEMBERING)
    simulation.run(33, 300)
    ahead = [op.scanned_end - op.recent_start for op in simulation.events]
    assert max(ahead) >= 32
    for op in simulation.events:
        # no query may score a token that is not older than itself
        assert op.scanned_end <= max(op.recent_start, op.first_query - simulation.options.query_window)
        assert op.scanned_end - op.condensed_end <= simulation.cfg.remembered_span


def test_without_weight_nothing_is_remembered_or_measured_beyond_the_candidates() -> None:
    simulation = Simulation(REMEMBERING.with_options(remembered_weight=0.0))
    simulation.run(33, 300)
    assert simulation.tables.condensed_energy.numel() == simulation.tables.dense_energy.numel() == 0
    assert all(op.scanned_end == op.recent_start for op in simulation.events)


def test_a_row_forgets_its_last_request() -> None:
    """The next request of a row decides as on a fresh server."""
    fresh, used = Simulation(REMEMBERING, seed=1), Simulation(REMEMBERING, seed=1)
    used.tables.condensed_energy.fill_(1.0)
    used.tables.dense_energy.fill_(1.0)
    kept = [simulation.run(33, 200).kept_counts for simulation in (fresh, used)]
    assert kept[0] == kept[1]
    assert torch.equal(fresh.attended, used.attended)
    assert fresh.tables.num_condensed[:, ROW].any()
