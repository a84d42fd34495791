"""Selection policies behind one seam: `Policy.score(candidates)`, then `Policy.choose(scored) -> Selection`."""

from __future__ import annotations

from collections.abc import Callable

from hardkv_sglang.config import HardKVConfig
from hardkv_sglang.policies.base import Policy
from hardkv_sglang.policies.hardkv import hardkv_policy
from hardkv_sglang.policies.rkv import rkv_policy
from hardkv_sglang.policies.snapkv import snapkv_policy
from hardkv_sglang.policies.streaming import streaming_policy
from hardkv_sglang.selection import BoundCounts, bound_counts

POLICIES: dict[str, Callable[[HardKVConfig, int, BoundCounts], Policy]] = {
    "hardkv": hardkv_policy,
    "snapkv": snapkv_policy,
    "rkv": rkv_policy,
    "streaming": streaming_policy,
}


def make_policy(options: HardKVConfig, page_size: int, bound: BoundCounts = bound_counts) -> Policy:
    """The policy that the options name; `HardKVConfig` admits only known names.

    page_size: tokens of a head page, which lists with a budget of their own fill; bound: applies floor and cap.
    """
    return POLICIES[options.policy](options, page_size, bound)
