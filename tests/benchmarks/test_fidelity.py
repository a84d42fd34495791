"""The fidelity benchmark computes what the server computes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.fidelity.__main__ import main
from bench.fidelity.configurations import quick_sweep
from bench.fidelity.model import BlockModel
from bench.fidelity.needle import FACTS, plant
from bench.fidelity.report import interpolate
from bench.fidelity.scores import Reference, TokenScores
from bench.fidelity.session import CompressedSession
from hardkv_sglang.config import HardKVConfig
from hardkv_sglang.kernels import reference
from hardkv_sglang.kernels.reference import State
from hardkv_sglang.selection.policies.base import Policy
from hardkv_sglang.selection.top_p import Scored, Selection

pytestmark = pytest.mark.slow

PROMPT, DECODED = 40, 240
ROUNDING = torch.finfo(torch.bfloat16).eps
SHORT: dict[str, Any] = {
    "recent_tokens": 32,
    "query_window": 16,
    "select_interval": 32,
    "condense_interval": 64,
    "min_tokens": 8,
    "top_p": 0.8,
}


class StepwiseSession(CompressedSession):
    """Decodes token by token through the reference operations of the decode backend."""

    def attend_tiers(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> State:
        assert k.shape[1] == 1
        cfg, pool = self.cfg, self.pool
        slots = reference.dense_slots(pool.req_to_token, self.tables, 1, self.seq_len + 1)
        dense = reference.dense_decode(q[:, 0], pool.k_storage[layer], pool.v_storage[layer], slots, cfg.softmax_scale)
        ragged = reference.ragged_decode(
            q[:, 0], pool.k_storage, pool.v_storage, cfg.layout, self.tables, pool.req_to_token,
            layer, 1, cfg.softmax_scale,
        )  # fmt: skip
        o, lse2 = reference.merge_states(dense, ragged)
        return o[:, None], lse2[:, None]


@dataclass
class Leader:
    """A policy that keeps what it chose from which scores."""

    policy: Policy
    choices: list[tuple[torch.Tensor, Selection]] = field(default_factory=list)

    def choose(self, scored: Scored, temperature: torch.Tensor | None) -> Selection:
        selection = self.policy.choose(scored, temperature)
        self.choices.append((scored.scores, selection))
        return selection


@dataclass
class Follower:
    """A policy that does as the leader did, and whose own choice may differ only where rounding decides.

    Energy is remembered in bfloat16, so sums in another order may come out one step apart.
    """

    policy: Policy
    choices: Iterator[tuple[torch.Tensor, Selection]]

    def choose(self, scored: Scored, temperature: torch.Tensor | None) -> Selection:
        own, (scores, leader) = self.policy.choose(scored, temperature), next(self.choices)
        torch.testing.assert_close(scored.scores, scores, rtol=ROUNDING, atol=1e-5 * scores.max().item())
        assert torch.equal(own.keep.sum(-1), leader.keep.sum(-1))
        for mine, theirs, of_list in zip(own.keep, leader.keep, scores.amax(1), strict=True):
            either = of_list[mine != theirs]
            assert len(either) in (0, 2)
            assert either.sum() == 0 or either.max() <= (1 + 2 * ROUNDING) * either.min()
        return leader


@pytest.fixture(scope="module")
def model(demo_model: Path) -> BlockModel:
    return BlockModel(demo_model)


@pytest.fixture(scope="module")
def dense(model: BlockModel) -> Reference:
    words = [(31 * i * i + 17 * i) % 20000 + 500 for i in range(97)]
    tokens = torch.tensor((words * 5)[: PROMPT + DECODED + 1])
    return Reference.build(model, tokens, PROMPT)


def decode(session: CompressedSession, model: BlockModel, dense: Reference) -> torch.Tensor:
    """Logits of every decoded token."""
    with torch.inference_mode():
        session.prefill(dense.cache, dense.prompt_len)
        hidden = torch.cat(list(session.decode(model, dense.decoded)))
    session.check()
    session.release()
    return model.logits(hidden)


def test_block_decode_equals_token_by_token(model: BlockModel, dense: Reference) -> None:
    options, max_len = HardKVConfig(**SHORT), PROMPT + DECODED
    blocks = CompressedSession(model.shape, options, max_len)
    steps = StepwiseSession(model.shape, options, max_len, max_block=1)
    leader = blocks.executor.policy = Leader(blocks.executor.policy)
    by_block = decode(blocks, model, dense)
    steps.executor.policy = Follower(steps.executor.policy, iter(leader.choices))
    by_token = decode(steps, model, dense)
    assert blocks.state.num_selects >= 5
    assert blocks.state.num_condenses >= 2
    assert blocks.selected == steps.selected
    assert blocks.holdings == steps.holdings
    assert (by_block - by_token).abs().max() < 1e-3
    # and compression did something
    assert (by_block - model.logits(dense.hidden)).abs().max() > 0.1


def test_p_one_equals_dense(model: BlockModel, dense: Reference) -> None:
    options = HardKVConfig(**{**SHORT, "top_p": 1.0, "max_tokens": None, "min_freed_pages": 0})
    session = CompressedSession(model.shape, options, PROMPT + DECODED)
    scores = TokenScores.compare(model.logits(dense.hidden), decode(session, model, dense), dense.tokens[PROMPT + 1 :])
    assert session.state.num_condenses >= 2
    assert scores.kl.abs().max() < 1e-6
    assert scores.agrees.all()


def test_identical_until_the_first_event(model: BlockModel, dense: Reference) -> None:
    session = CompressedSession(model.shape, HardKVConfig(**SHORT), PROMPT + DECODED)
    scores = TokenScores.compare(model.logits(dense.hidden), decode(session, model, dense), dense.tokens[PROMPT + 1 :])
    first_event = sum(not holding.is_compressed for holding in session.holdings)
    assert 0 < first_event < DECODED
    assert scores.kl[:first_event].abs().max() < 1e-6
    assert scores.kl[first_event:].mean() > 1e-4


def test_held_pages_are_those_of_the_pool(model: BlockModel, dense: Reference) -> None:
    session = CompressedSession(model.shape, HardKVConfig(**SHORT), PROMPT + DECODED)
    decode(session, model, dense)
    last, size = session.holdings[-1], session.cfg.layout.page_size
    dense_pages = -(-(last.position + 1) // size)
    assert (
        last.held_pages == dense_pages - (last.condensed_end - session.state.prefix_end) // size + last.condensed_pages
    )


def test_kl_of_a_known_pair() -> None:
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.5, 0.25]])
    scores = TokenScores.compare(p.log() + 3.0, q.log() - 2.0, torch.tensor([1]))
    assert scores.kl.item() == pytest.approx(0.25 * torch.tensor(2.0).log().item(), abs=1e-6)
    assert not scores.agrees.item()
    assert scores.compressed_nll.item() == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-6)
    assert scores.compressed_correct.item() and not scores.dense_correct.item()


def test_interpolation() -> None:
    curve = [{"kept": 0.1, "mean_kl": 0.04}, {"kept": 0.4, "mean_kl": 0.01}]
    assert interpolate(curve, 0.2, "mean_kl") == pytest.approx(0.02)
    assert interpolate(curve, 0.1, "mean_kl") == pytest.approx(0.04)
    assert interpolate(curve, 0.05, "mean_kl") is None


def test_needles_are_planted_and_asked_for() -> None:
    tokens, spans = plant([0] * 500, 100, 300, lambda text: [ord(letter) for letter in text])
    text = "".join(chr(token) for token in tokens.tolist())
    assert [span.name for span in spans] != [name for name, _, _ in FACTS]
    for span in spans:
        secret = next(secret for name, secret, _ in FACTS if name == span.name)
        assert text[span.start : span.end] == f" {secret}"
        assert text.index(f"code of the {span.name} box is {secret}.") >= 100 + int(span.depth * 300)


def test_quick_run_reports_every_configuration(tmp_path: Path) -> None:
    assert main(["--quick", "--work", str(tmp_path / "work"), "--results", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "fidelity_quick.json").read_text())
    points = {point["name"]: point for point in report["configurations"]}
    assert set(points) == {configuration.name for configuration in quick_sweep()}
    assert points["exact top_p=1"]["mean_kl"] < 1e-5
    shipped = points["hardkv shipped"]
    assert 0 < shipped["mean_kl"] < 0.5
    assert 0 < shipped["kept"] < 0.6
    assert shipped["agreement"] > 0.8
    assert (tmp_path / "fidelity_quick.csv").read_text().count("\n") == 1 + len(points)
