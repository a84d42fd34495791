"""Device memory of the ragged decode attention, and how its work is cut and launched."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from hardkv_sglang.memory_pool.layout import PoolLayout

MAX_SPLITS = 32
"""Lists past that many splits get longer ones instead, which bounds what the last program of a list has to merge."""
ITEM_FIELDS = 8


@dataclass(frozen=True)
class SplitRule:
    """How lists are cut."""

    tokens: int
    is_even: bool  # else every split but a list's last has `tokens` tokens

    @classmethod
    def even(cls) -> SplitRule:
        """Every program gets the same number of tokens, 128 at least, across the ends of lists: all end together.

        Where a list is cut depends on the other requests of the batch, and with it rounding.
        """
        return cls(128, True)

    @classmethod
    def fixed(cls) -> SplitRule:
        """The same for every batch, for results that do not depend on it."""
        return cls(256, False)


@dataclass(frozen=True)
class Tuning:
    """Launch parameters of the kernel. Results depend on the first two, and only in rounding."""

    block_tokens: int
    num_warps: int
    num_stages: int
    programs_per_multiprocessor: int  # as many as fit, because every program gets the same share

    @classmethod
    def default(cls, row_bytes: int, num_lists: int, num_multiprocessors: int) -> Tuning:
        """Best measured on an H200 for K rows of `row_bytes` and `num_lists` lists per layer.

        Few lists: wide programs, for latency. Many: narrow ones, so that more of them hide each other's stalls.
        """
        if row_bytes > 256:
            return cls(block_tokens=32, num_warps=4, num_stages=2, programs_per_multiprocessor=2)
        if num_lists <= num_multiprocessors // 2:
            return cls(block_tokens=64, num_warps=4, num_stages=3, programs_per_multiprocessor=2)
        return cls.many_lists()

    @classmethod
    def many_lists(cls) -> Tuning:
        """What `default` gives a full batch."""
        return cls(block_tokens=32, num_warps=2, num_stages=3, programs_per_multiprocessor=4)


@dataclass(frozen=True)
class RaggedWorkspace:
    """Shared by all layers and all batch sizes of one stream; the caller owns it."""

    items: torch.Tensor  # [L, N, 8] int32, one split each: list, row, start, end, condensed tokens, first page,
    # first item of the list, splits of the list
    program_items: torch.Tensor  # [L, P + 1] int32, first item of each program
    partial_o: torch.Tensor  # [N, G, D] float32
    partial_lse2: torch.Tensor  # [N, G] float32
    arrivals: torch.Tensor  # [max_batch * H] int32, finished splits of each list; zero between launches
    max_splits: int
    num_multiprocessors: int
    rule: SplitRule
    tuning: Tuning | None  # None: the default for the size of the batch

    @classmethod
    def allocate(
        cls,
        layout: PoolLayout,
        num_q_heads: int,
        max_batch: int,
        max_list_tokens: int,
        device: torch.device | str,
        rule: SplitRule,
        tuning: Tuning | None = None,
    ) -> RaggedWorkspace:
        """Allocate for batches up to `max_batch`.

        max_list_tokens: longest expected list, condensed and sparse; longer ones stay correct, in longer splits.
        """
        on_gpu = torch.device(device).type == "cuda"
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 1
        max_splits = max(2, min(MAX_SPLITS, triton.cdiv(max_list_tokens, rule.tokens) + 1))
        max_lists, G = max_batch * layout.num_kv_heads, num_q_heads // layout.num_kv_heads
        max_programs = multiprocessors * (tuning.programs_per_multiprocessor if tuning else 8)
        # an even cut falls once into each program
        L, N = layout.num_layers, max_lists + max_programs if rule.is_even else max_lists * max_splits

        def zeros(*shape: int, kind: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=kind, device=device)

        return cls(
            items=zeros(L, N, ITEM_FIELDS),
            program_items=zeros(L, max_programs + 1),
            partial_o=zeros(N, G, layout.head_dim, kind=torch.float32),
            partial_lse2=zeros(N, G, kind=torch.float32),
            arrivals=zeros(max_lists),
            max_splits=max_splits,
            num_multiprocessors=multiprocessors,
            rule=rule,
            tuning=tuning,
        )

    @property
    def max_lists(self) -> int:
        """Most lists of one batch."""
        return self.arrivals.numel()

    @property
    def num_bytes(self) -> int:
        """Device memory of the workspace, in bytes."""
        tensors = (self.items, self.program_items, self.partial_o, self.partial_lse2, self.arrivals)
        return sum(t.numel() * t.element_size() for t in tensors)

    def tuning_for(self, num_lists: int) -> Tuning:
        """Launch parameters for a batch of `num_lists` lists."""
        row_bytes = self.partial_o.shape[-1] * 2
        return self.tuning or Tuning.default(row_bytes, num_lists, self.num_multiprocessors)

    def num_programs(self, num_lists: int) -> int:
        """Programs that share the work of a batch of `num_lists` lists; the plan is made for them."""
        programs = self.num_multiprocessors * self.tuning_for(num_lists).programs_per_multiprocessor
        return min(programs, num_lists * self.max_splits)
