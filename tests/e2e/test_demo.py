"""The demo's rounds on a real server with its flags: what a stranger sees first."""

from __future__ import annotations

from collections.abc import Callable
from io import StringIO

import pytest
from e2e.compressed import whole_model
from rich.console import Console

from hardkv_sglang.cli import demo
from hardkv_sglang.cli.demo import Answer
from hardkv_sglang.cli.demo_view import DemoView
from hardkv_sglang.cli.server_process import ServerProcess as Server

pytestmark = whole_model
NUM_TOKENS = 300


class RecordingView(DemoView):
    """Keeps the answers that it shows."""

    answers: list[tuple[Answer, Answer]]

    def compare(self, prompt: str, dense: Answer, compressed: Answer) -> None:
        self.answers.append((dense, compressed))
        super().compare(prompt, dense, compressed)


def repeated_share(text: str) -> float:
    """Share of the sequences of four words that were there before."""
    words = text.split()
    fours = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    return 1 - len(set(fours)) / max(1, len(fours))


@pytest.mark.cpu  # the texts depend on rounding
def test_compressed_answers_are_as_sensible_as_dense_ones(server_for: Callable[..., Server]) -> None:
    output = StringIO()
    view = RecordingView(Console(file=output, width=100, highlight=False))
    view.answers = []
    demo.demonstrate(view, server_for(demo.server_flags()), NUM_TOKENS)
    assert len(view.answers) == len(demo.PROMPTS)
    for dense, compressed in view.answers:
        assert repeated_share(dense.text) < 0.05
        assert repeated_share(compressed.text) < 0.05
        # both begin alike: nothing is dropped before the first event
        assert dense.text[:200] == compressed.text[:200]
        assert compressed.num_tokens > NUM_TOKENS / 2
    assert max(view.pool["compressed"]) < 0.9 * max(view.pool["dense"])
    assert "KV held at the end" in output.getvalue()
