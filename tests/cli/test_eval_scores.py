"""What `hardkv eval` makes of two scorings and of looks at a server."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from hardkv_sglang.cli.eval_held import HeldWatch
from hardkv_sglang.cli.eval_scores import BIN, PromptScore, Scored, standard_error, summarise


def score(differences: list[float], first: int = 0) -> PromptScore:
    """A text whose decoded log-probabilities lie so much above those of its prefill."""
    ids = list(range(len(differences)))
    dense = Scored(ids, [-1.0] * len(ids), ids)
    decoded = Scored(ids, [d - 1.0 for d in differences], [i if d < 0.5 else -1 for i, d in enumerate(differences)])
    return PromptScore.of(7, decoded, dense, first)


def test_kl_is_the_mean_over_all_tokens_and_agreement_their_share() -> None:
    report = summarise([score([0.0, 1.0]), score([0.2, 0.2, 0.2, 0.2])])
    assert report["tokens"] == 6
    assert report["kl"] == pytest.approx(1.8 / 6)
    assert report["agreement"] == pytest.approx(5 / 6)
    assert report["max_difference"] == pytest.approx(1.0)


def test_the_first_tokens_do_not_count() -> None:
    report = summarise([score([9.0, 9.0, 0.1, 0.3], first=2)], first=2)
    assert report["tokens"] == 2
    assert report["kl"] == pytest.approx(0.2)
    assert report["first_token"] == 2


def test_the_standard_error_is_over_prompts() -> None:
    same = [score([0.0, 1.0]), score([1.0, 0.0])]
    assert standard_error(same) == 0.0
    assert standard_error([score([0.0] * 50), score([2.0] * 50)]) == pytest.approx(1.0)
    assert standard_error(same[:1]) == pytest.approx(0.5)


def test_kl_by_position_counts_from_the_first_token_of_the_output() -> None:
    first = BIN - 1
    report = summarise([score([0.0] * first + [1.0, 3.0], first), score([0.0] * first + [2.0], first)], first)
    assert report["kl_by_position"] == [
        {"token": 0, "kl": pytest.approx(1.5), "tokens": 2},
        {"token": BIN, "kl": pytest.approx(3.0), "tokens": 1},
    ]


def test_held_is_a_sum_over_looks_behind_the_first_token() -> None:
    watch = HeldWatch("http://127.0.0.1:9", first_token=320, page_size=32)
    assert watch.report() == {"held": None, "held_over_time": []}
    for running, output_pages, dense_output_pages in ((2, 18, 18), (2, 15, 30), (2, 15, 45), (0, 0, 0)):
        found = SimpleNamespace(
            running_requests=running, output_pages=output_pages, dense_output_pages=dense_output_pages
        )
        watch._add(found, 1.0)  # type: ignore[arg-type]
    report = watch.report()
    assert report["held"] == pytest.approx(30 / 75)
    assert [look["dense_output_pages"] for look in report["held_over_time"]] == [30, 45]
