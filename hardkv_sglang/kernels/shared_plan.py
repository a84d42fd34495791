"""Work list of the shared-prefix kernel: groups of requests cut into tiles of queries and splits of tokens.

Planned on the host, when the running requests change, and copied into memory that a captured graph reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton

from hardkv_sglang.memory_pool.layout import PoolLayout
from hardkv_sglang.prefix_groups import PrefixGroup

SPLIT_ALIGN = 64
MIN_SPLIT = 256
ITEM_FIELDS = 8


@dataclass(frozen=True)
class SharedTuning:
    """Launch parameters of the kernel."""

    tile_rows: int  # query rows (request and query head of one KV head) that one program attends
    block_tokens: int
    num_warps: int
    num_stages: int
    programs_per_multiprocessor: int

    @classmethod
    def default(cls, row_bytes: int) -> SharedTuning:
        """For K rows of `row_bytes`: what fits a multiprocessor."""
        if row_bytes > 256:
            return cls(tile_rows=64, block_tokens=32, num_warps=4, num_stages=2, programs_per_multiprocessor=2)
        return cls(tile_rows=64, block_tokens=64, num_warps=4, num_stages=3, programs_per_multiprocessor=2)


@dataclass(frozen=True)
class SharedPrefixWorkspace:
    """Device memory of the op, shared by all layers and batch sizes of one stream; written by `plan` only."""

    table: torch.Tensor  # int32, one copy from the host: the four below are views of it
    num_items: torch.Tensor  # [1] int32
    shared_len: torch.Tensor  # [max_batch] int32, leading tokens of each batch entry that its group attends
    members: torch.Tensor  # [max_batch] int32, batch entries, group after group
    items: torch.Tensor  # [N, 8] int32: first member, members, start, end, tile, first item of the tile, splits, 0
    partial_o: torch.Tensor  # [H, N, tile_rows, D] float32
    partial_lse2: torch.Tensor  # [H, N, tile_rows] float32
    arrivals: torch.Tensor  # [tiles, H] int32, finished splits; zero between launches
    tile_members: int
    num_programs: int
    tuning: SharedTuning

    @classmethod
    def allocate(
        cls,
        layout: PoolLayout,
        num_q_heads: int,
        max_batch: int,
        device: torch.device | str,
        tuning: SharedTuning,
    ) -> SharedPrefixWorkspace:
        """Allocate for batches up to `max_batch`, empty. Raises `ValueError` if a KV head has too many query heads."""
        tile_members = tuning.tile_rows * layout.num_kv_heads // num_q_heads
        if tile_members == 0:
            raise ValueError(f"more than {tuning.tile_rows} query heads per KV head: set min_shared_tokens to null")
        on_gpu = torch.device(device).type == "cuda"
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 1
        programs = multiprocessors * tuning.programs_per_multiprocessor
        # a group has two members at least, which small tiles may separate
        max_tiles = max(1, max_batch // 2) if tile_members > 2 else max_batch
        max_items = max_tiles + triton.cdiv(programs, layout.num_kv_heads)
        H, D = layout.num_kv_heads, layout.head_dim
        table = torch.zeros(1 + 2 * max_batch + max_items * ITEM_FIELDS, dtype=torch.int32, device=device)
        num_items, shared_len, members, items = table.split((1, max_batch, max_batch, max_items * ITEM_FIELDS))
        return cls(
            table=table,
            num_items=num_items,
            shared_len=shared_len,
            members=members,
            items=items.view(max_items, ITEM_FIELDS),
            partial_o=torch.zeros(H, max_items, tuning.tile_rows, D, dtype=torch.float32, device=device),
            partial_lse2=torch.zeros(H, max_items, tuning.tile_rows, dtype=torch.float32, device=device),
            arrivals=torch.zeros(max_tiles, H, dtype=torch.int32, device=device),
            tile_members=tile_members,
            num_programs=programs,
            tuning=tuning,
        )

    @property
    def num_bytes(self) -> int:
        """Device memory of the workspace, in bytes."""
        tensors = (self.table, self.partial_o, self.partial_lse2, self.arrivals)
        return sum(t.numel() * t.element_size() for t in tensors)

    def plan(self, groups: Sequence[PrefixGroup]) -> torch.Tensor:
        """Replace the work list; returns the shared tokens of each batch entry, [max_batch] int32 on the host.

        Guarantees: no sync; the copy is ordered on the current stream.
        """
        max_batch, num_heads = self.shared_len.numel(), self.arrivals.shape[1]
        tiles: list[tuple[int, int, int]] = []  # first member, members, tokens
        members: list[int] = []
        shared_len = [0] * max_batch
        for group in groups:
            for entry in group.members:
                shared_len[entry] = group.num_tokens
            for first in range(0, len(group.members), self.tile_members):
                count = min(self.tile_members, len(group.members) - first)
                tiles.append((len(members) + first, count, group.num_tokens))
            members.extend(group.members)
        items = cut_tiles(tiles, max(1, self.num_programs // num_heads))
        assert len(items) <= self.items.shape[0], "more work items than the workspace was allocated for"
        flat = [field for item in items for field in item]
        padding = [0] * (self.table.numel() - 1 - 2 * max_batch - len(flat))
        values = [len(items), *shared_len, *members, *[0] * (max_batch - len(members)), *flat, *padding]
        # from pinned memory, which PyTorch keeps until the copy is done, the host does not wait
        host = torch.tensor(values, dtype=torch.int32, pin_memory=self.table.is_cuda)
        self.table.copy_(host, non_blocking=True)
        return host[1 : 1 + max_batch]


def cut_tiles(tiles: Sequence[tuple[int, int, int]], target: int) -> list[tuple[int, ...]]:
    """Items of all tiles: at least about `target` of them where the splits would not become too short."""
    total = sum(tokens for _, _, tokens in tiles)
    split = max(MIN_SPLIT, triton.cdiv(triton.cdiv(total, target), SPLIT_ALIGN) * SPLIT_ALIGN)
    items: list[tuple[int, ...]] = []
    for tile, (first, count, tokens) in enumerate(tiles):
        size = triton.cdiv(triton.cdiv(tokens, triton.cdiv(tokens, split)), SPLIT_ALIGN) * SPLIT_ALIGN
        splits, first_item = triton.cdiv(tokens, size), len(items)
        for start in range(0, tokens, size):
            items.append((first, count, start, min(start + size, tokens), tile, first_item, splits, 0))
    return items
