"""R-KV with its own budget: the same number of tokens for every KV head."""

from __future__ import annotations

from hardkv_sglang.config import HardKVConfig
from hardkv_sglang.policies.uniform import UniformPolicy
from hardkv_sglang.selection import BoundCounts


def rkv_policy(options: HardKVConfig, page_size: int, bound: BoundCounts) -> UniformPolicy:
    """Keep `uniform_tokens` candidates by attention minus redundancy (R-KV, arXiv 2505.24133)."""
    del page_size
    return UniformPolicy(options, "rkv", bound)
