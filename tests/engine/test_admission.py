"""Admission and pressure relief, in a host-only simulation of SGLang's scheduler."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
from engine.simulated_serving import Request, Serving
from hypothesis import given, settings
from hypothesis import strategies as st
from lifecycle.page_pool import PAGE

from hardkv_sglang.config import HardKVConfig
from hardkv_sglang.lifecycle.expectation import PRIOR_SHARE, KeptShare, OutputLength
from hardkv_sglang.lifecycle.forecast import OutlookStack
from hardkv_sglang.lifecycle.tiers import largest_copy, running_outlooks, stages_and_gains
from hardkv_sglang.lifecycle.usage_peak import Outlook, insert_last, usage_peak

DEFAULTS = HardKVConfig(select_interval=512)
POOL_PAGES = 188  # 6016 tokens


def keep_share(share: float) -> Callable[[random.Random, int], int]:
    return lambda rng, aged: int(max(32, rng.uniform(0.5, 1.5) * share * aged))


def keep_all(_rng: random.Random, aged: int) -> int:
    return aged  # or, where there is one, the cap


def keep_like_measured(rng: random.Random, aged: int) -> int:
    return int(max(32, rng.uniform(0.5, 1.5) * 1.3 * aged**0.8)) if aged > 64 else aged


def same_requests(num: int, num_output: int) -> list[Request]:
    return [Request(str(i), 40, num_output, num_output, ignore_eos=True) for i in range(num)]


def serve(requests: list[Request], num_pages: int, **changes: object) -> Serving:
    kept = changes.pop("kept_tokens", keep_share(0.3))
    serving = Serving(DEFAULTS.with_options(**changes), num_pages, list(requests), kept)  # type: ignore[arg-type]
    serving.run()
    return serving


def retractions(requests: list[Request]) -> int:
    return sum(r.retractions for r in requests)


@pytest.mark.parametrize("select_interval", [128, 512])
@pytest.mark.parametrize("kept", [keep_share(0.15), keep_share(0.3), keep_like_measured])
def test_the_acceptance_load_fits_without_retraction(
    select_interval: int, kept: Callable[[random.Random, int], int]
) -> None:
    requests = same_requests(16, 1500)
    serving = serve(requests, POOL_PAGES, select_interval=select_interval, kept_tokens=kept)
    assert retractions(requests) == 0
    # dense, three of them fit at a time, or four if one dares
    assert serving.sum_running / serving.decode_steps > 5


@pytest.mark.parametrize("lengths", ["equal", "uniform", "exponential", "equal but unknown"])
def test_mixed_loads_retract_at_most_one_in_a_hundred(lengths: str) -> None:
    rng = random.Random(0)
    draw = {
        "equal": lambda: 3000,
        "equal but unknown": lambda: 3000,
        "uniform": lambda: rng.randrange(10, 6000),
        "exponential": lambda: min(16000, 1 + int(rng.expovariate(1 / 3000))),
    }[lengths]
    requests = []
    for i in range(200):
        num_output, is_known = draw(), lengths in ("equal", "uniform")
        most = num_output if is_known else 16000
        requests.append(Request(str(i), rng.randrange(20, 800), num_output, most, ignore_eos=is_known))
    serving = serve(requests, 1250, kept_tokens=keep_like_measured)
    assert retractions(requests) <= 2
    assert serving.decode_steps < 50_000


def test_requests_that_keep_everything_are_admitted_like_dense_ones() -> None:
    requests = same_requests(16, 1500)
    serving = serve(requests, POOL_PAGES, top_p=1.0, max_tokens=None, kept_tokens=keep_all)
    assert retractions(requests) == 0
    assert serving.statistics.select_events == serving.statistics.condense_events == 0


def test_flat_attention_below_a_cap_retracts_at_most_one_in_a_hundred() -> None:
    """Lists keep everything up to the cap: young requests give nothing back, and all of a wave peak together."""
    retracted = 0
    for num_pages in (320, 330, 340, 350):
        requests = [Request(str(i), 128, 1024, 1024, ignore_eos=True) for i in range(64)]
        serving = serve(
            requests, num_pages, recent_tokens=128, select_interval=128, condense_interval=128, max_tokens=256,
            kept_tokens=keep_all,
        )  # fmt: skip
        retracted += retractions(requests)
        # each has 128 tokens of prompt, 256 condensed ones and at most 256 that are not
        assert serving.sum_running / serving.decode_steps > 0.8 * num_pages * PAGE / 640
    assert retracted <= 2


def test_a_request_that_is_alone_is_never_refused() -> None:
    requests = same_requests(2, 5000)
    serving = serve(requests, POOL_PAGES, kept_tokens=keep_share(0.5))
    assert serving.decode_steps < 2 * 5000 + 10


def test_ample_memory_means_no_early_event() -> None:
    requests = same_requests(16, 1500)
    serving = serve(requests, 2000)
    assert serving.statistics.early_events == serving.statistics.retractions_avoided == 0


def test_early_events_avoid_retraction() -> None:
    """More requests than admission lets in: relief alone must carry them."""
    requests = same_requests(9, 1200)
    serving = Serving(DEFAULTS, POOL_PAGES, [], keep_share(0.15))
    serving.force(requests)
    serving.run()
    assert retractions(requests) == 0
    assert serving.statistics.early_events > 0
    assert serving.statistics.retractions_avoided > 0


def test_a_retracted_request_finishes_and_compresses_again() -> None:
    requests = same_requests(14, 1500)
    serving = Serving(DEFAULTS, 140, [], keep_share(0.3))
    serving.force(requests)
    serving.run()
    assert retractions(requests) > 0
    assert all(r.num_decoded == 1500 for r in requests)
    again = [r.rid for r in requests if r.retractions]
    assert any(serving.condenses_after_retraction.get(rid) for rid in again)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    num_pages=st.sampled_from([60, 120, 300]),
    select=st.sampled_from([32, 64]),
    share=st.sampled_from([0.1, 0.4, 0.9]),
)
def test_random_servings_conserve_pages(seed: int, num_pages: int, select: int, share: float) -> None:
    """Ownership, order of allocations and frees, and table bounds are proved at every step, see `Serving.check`."""
    rng = random.Random(seed)
    options = HardKVConfig(
        recent_tokens=32, query_window=16, select_interval=select, condense_interval=64, min_tokens=8
    )
    requests = []
    for i in range(12):
        num_output = rng.randrange(1, 500)
        requests.append(Request(str(i), rng.randrange(1, 200), num_output, num_output, ignore_eos=rng.random() < 0.5))
    serving = Serving(options, num_pages, [], keep_share(share), seed=seed, is_checked=True)
    serving.force(requests[:3])
    serving.waiting = requests[3:]
    serving.run()
    assert sorted(serving.pool.free) == list(range(1, num_pages + 1))


def test_kept_shares_are_learned_by_age() -> None:
    kept = KeptShare(512)
    ages = np.array([0, 512, 1024, 8192])
    assert kept.tokens(ages) == pytest.approx(PRIOR_SHARE * ages)
    for _ in range(400):
        kept.add(512, 512)
        kept.add(512, 1024)
    # ages that nobody has reached yet are like the oldest that somebody has
    assert kept.tokens(ages) == pytest.approx(np.array([0, 512, 512, 4096]), rel=0.01)
    assert [kept.share(age) for age in ages.tolist()] == pytest.approx([PRIOR_SHARE, 1, 0.5, 0.5], rel=0.01)


def test_overdue_events_are_still_to_come() -> None:
    serving = Serving(DEFAULTS, POOL_PAGES, [], keep_all)
    forecast, kept = serving.admission.forecast, serving.planner.kept
    outlook = Outlook(
        prompt=0, held=640, dense=640, condensed=0, aged=0, first_condense=-30, expected_steps=8, most_steps=8
    )
    # nothing is given back before the next step, and a page more is opened in it
    stack = OutlookStack(np.array([outlook], dtype=np.float64))
    assert forecast.growth(stack, kept, 1) >= PAGE


def test_output_length_counts_running_requests() -> None:
    length = OutputLength()
    length.add_tokens(300)
    assert length.mean == float("inf")
    # one of three requests that decoded 100 tokens each has ended: the others will take longer
    length.add_end()
    assert length.mean == 300


def test_pool_smaller_than_one_page_per_request() -> None:
    requests = same_requests(6, 100)
    serving = serve(requests, 12)
    assert serving.min_free >= 0
    assert all(r.num_decoded >= 100 for r in requests)
    assert sum(r.num_prompt + r.num_output for r in requests) > PAGE * 12


def test_nothing_is_compiled_once_a_server_is_warm() -> None:
    """Neither for the first candidate nor when the pool first runs low: one type of every argument, that of warm-up."""
    Serving(DEFAULTS, POOL_PAGES, [], keep_all).admission.warm_up()
    compiled = (usage_peak, insert_last, running_outlooks, largest_copy, stages_and_gains)
    warm = [function.signatures for function in compiled]  # type: ignore[attr-defined]
    requests = same_requests(12, 1000)
    serving = Serving(DEFAULTS, POOL_PAGES, requests[9:], keep_share(0.15))
    serving.force(requests[:9])
    serving.run()
    assert serving.statistics.early_events > 0
    assert [function.signatures for function in compiled] == warm  # type: ignore[attr-defined]
    assert all(len(signatures) == 1 for signatures in warm)
