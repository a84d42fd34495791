"""Selection policies behind one seam: `Policy.select(candidates, temperature) -> Selection`."""

from __future__ import annotations

from collections.abc import Callable

from hardkv_sglang.config import HardKVConfig
from hardkv_sglang.policies.base import Policy
from hardkv_sglang.policies.hardkv import hardkv_policy
from hardkv_sglang.policies.rkv import rkv_policy
from hardkv_sglang.policies.snapkv import snapkv_policy
from hardkv_sglang.policies.streaming import StreamingPolicy

POLICIES: dict[str, Callable[[HardKVConfig], Policy]] = {
    "hardkv": hardkv_policy,
    "snapkv": snapkv_policy,
    "rkv": rkv_policy,
    "streaming": StreamingPolicy,
}


def make_policy(options: HardKVConfig) -> Policy:
    """The policy that the options name; `HardKVConfig` admits only known names."""
    return POLICIES[options.policy](options)
