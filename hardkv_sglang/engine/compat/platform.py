"""What SGLang's out-of-tree platforms have to bring.

Read on 0.5.17 to 0.5.23. Since 0.5.22 a platform declares its capabilities, and SGLang allocates pages without Triton
by itself where the platform has none.
"""

from __future__ import annotations


def allocates_pages_in_torch() -> bool:
    """Whether SGLang's own paged allocator serves a machine without Triton."""
    from sglang.srt.platforms.interface import SRTPlatform

    return hasattr(SRTPlatform, "capabilities")
