"""Device memory of the ragged decode attention, and how its work is cut and launched."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton

from hardkv_sglang.memory_pool.layout import PoolLayout

MAX_SPLITS = 32
"""Lists past that many splits get longer ones instead, which bounds the partial results."""
ITEM_FIELDS = 8


@dataclass(frozen=True)
class SplitTokens:
    """Tokens per split: a list is cut into `ceil(length / split)` splits of equal size, rounded up to `SPLIT_ALIGN`.

    Long splits waste less on starting and merging, short ones balance the multiprocessors when there is little work.
    """

    small: int
    middle: int
    large: int

    @classmethod
    def by_load(cls) -> SplitTokens:
        """The fastest for what a layer has to read: rounding depends on the other requests of the batch."""
        return cls(256, 512, 1024)

    @classmethod
    def fixed(cls) -> SplitTokens:
        """The same for every batch, for results that do not depend on it."""
        return cls(256, 256, 256)


@dataclass(frozen=True)
class Tuning:
    """Launch parameters of the kernel. Results depend on the first two, and only in rounding."""

    block_tokens: int
    num_warps: int
    num_stages: int
    programs_per_multiprocessor: int  # beyond what fits, so that the hardware balances uneven items

    @classmethod
    def default(cls, row_bytes: int, num_lists: int, num_multiprocessors: int) -> Tuning:
        """Best measured on an H200 for K rows of `row_bytes` and `num_lists` lists per layer.

        Few lists: wide programs, for latency. Many: narrow ones, so that more of them hide each other's stalls.
        """
        if row_bytes > 256:
            return cls(block_tokens=32, num_warps=4, num_stages=2, programs_per_multiprocessor=6)
        if num_lists <= num_multiprocessors // 2:
            return cls(block_tokens=64, num_warps=4, num_stages=3, programs_per_multiprocessor=6)
        most = cls.many_lists()
        # programs that find no item cost as much as any to start: about as many as there will be splits
        programs = max(8, triton.cdiv(2 * num_lists, num_multiprocessors))
        return replace(most, programs_per_multiprocessor=min(programs, most.programs_per_multiprocessor))

    @classmethod
    def many_lists(cls) -> Tuning:
        """What `default` gives a full batch."""
        return cls(block_tokens=32, num_warps=2, num_stages=3, programs_per_multiprocessor=20)


@dataclass(frozen=True)
class RaggedWorkspace:
    """Device memory of the op, shared by all layers and all batch sizes of one stream; the caller owns it."""

    items: torch.Tensor  # [L, N, 8] int32, one split each: list, row, start, end, condensed tokens, first page,
    # first item of the list, splits of the list
    num_items: torch.Tensor  # [L] int32
    partial_o: torch.Tensor  # [N, G, D] float32
    partial_lse2: torch.Tensor  # [N, G] float32
    arrivals: torch.Tensor  # [max_batch * H] int32, finished splits of each list; zero between launches
    max_splits: int
    num_multiprocessors: int
    split: SplitTokens

    @classmethod
    def allocate(
        cls,
        layout: PoolLayout,
        num_q_heads: int,
        max_batch: int,
        max_list_tokens: int,
        device: torch.device | str,
        split: SplitTokens,
    ) -> RaggedWorkspace:
        """Allocate for batches up to `max_batch`.

        max_list_tokens: longest expected list, condensed and sparse; longer ones stay correct, in longer splits.
        """
        max_splits = most_splits(max_list_tokens, split)
        shapes = workspace_shapes(layout, num_q_heads, max_batch, max_splits)
        on_gpu = torch.device(device).type == "cuda"
        return cls(
            **{name: torch.zeros(shape, dtype=kind, device=device) for name, (shape, kind) in shapes.items()},
            max_splits=max_splits,
            num_multiprocessors=torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 1,
            split=split,
        )

    @property
    def max_lists(self) -> int:
        """Most lists of one batch."""
        return self.arrivals.numel()

    @property
    def num_bytes(self) -> int:
        """Device memory of the workspace, in bytes."""
        tensors = (self.items, self.num_items, self.partial_o, self.partial_lse2, self.arrivals)
        return sum(t.numel() * t.element_size() for t in tensors)


def most_splits(max_list_tokens: int, split: SplitTokens) -> int:
    """Most splits of one list, for lists of so many tokens."""
    return max(1, min(MAX_SPLITS, triton.cdiv(max_list_tokens, split.small)))


def workspace_shapes(
    layout: PoolLayout, num_q_heads: int, max_batch: int, max_splits: int
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of the tensors of a `RaggedWorkspace`."""
    max_lists, G = max_batch * layout.num_kv_heads, num_q_heads // layout.num_kv_heads
    L, N = layout.num_layers, max_lists * max_splits
    return {
        "items": ((L, N, ITEM_FIELDS), torch.int32),
        "num_items": ((L,), torch.int32),
        "partial_o": ((N, G, layout.head_dim), torch.float32),
        "partial_lse2": ((N, G), torch.float32),
        "arrivals": ((max_lists,), torch.int32),
    }
