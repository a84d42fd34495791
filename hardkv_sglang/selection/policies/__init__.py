"""Selection policies behind one seam: `Policy.score(candidates)`, then `Policy.choose(scored) -> Selection`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from hardkv_sglang.config import HardKVConfig
from hardkv_sglang.selection.policies.base import Policy
from hardkv_sglang.selection.policies.hardkv import hardkv_policy
from hardkv_sglang.selection.policies.streaming import streaming_policy
from hardkv_sglang.selection.policies.uniform import uniform_policy
from hardkv_sglang.selection.top_p import BoundCounts, bound_counts

POLICIES: dict[str, Callable[[HardKVConfig, int, BoundCounts], Policy]] = {
    "hardkv": hardkv_policy,
    "snapkv": partial(uniform_policy, "snapkv"),  # pooled attention (arXiv 2404.14469)
    "rkv": partial(uniform_policy, "rkv"),  # attention minus redundancy (arXiv 2505.24133)
    "streaming": streaming_policy,
}


def make_policy(options: HardKVConfig, page_size: int, bound: BoundCounts = bound_counts) -> Policy:
    """The policy that the options name; `HardKVConfig` admits only known names.

    page_size: tokens of a head page, which lists with a budget of their own fill; bound: applies floor and cap.
    """
    return POLICIES[options.policy](options, page_size, bound)
