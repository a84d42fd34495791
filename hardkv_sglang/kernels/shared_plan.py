"""Work list of the shared-prefix kernel: groups of requests cut into tiles of queries and splits of tokens.

Planned on the host, when the running requests change, and copied into memory that a captured graph reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton

from hardkv_sglang.lifecycle.prefix_groups import PrefixGroup
from hardkv_sglang.memory_pool.layout import PoolLayout

SPLIT_ALIGN = 64
MIN_SPLIT = 256
ENTRY_FIELDS = 4


class SharedItem(NamedTuple):
    """One program's work: a tile of queries and a split of its group's tokens."""

    first_member: int  # in the list of members
    num_members: int
    start: int  # positions [start, end) of the prefix
    end: int
    first_slot: int  # of the group, in the list of slots


ITEM_FIELDS = len(SharedItem._fields)


@dataclass(frozen=True)
class SharedTuning:
    """Launch parameters of the kernel."""

    tile_rows: int  # query rows (request and query head of one KV head) that one program attends
    block_tokens: int
    num_warps: int
    num_stages: int
    programs_per_multiprocessor: int

    @classmethod
    def default(cls, row_bytes: int, group_size: int) -> SharedTuning:
        """For K rows of `row_bytes` and `group_size` query heads per KV head: what fits a multiprocessor."""
        tile_rows = max(64, triton.next_power_of_2(group_size))
        if row_bytes > 256:
            return cls(tile_rows, block_tokens=32, num_warps=4, num_stages=2, programs_per_multiprocessor=2)
        return cls(tile_rows, block_tokens=64, num_warps=4, num_stages=3, programs_per_multiprocessor=2)


@dataclass(frozen=True)
class SharedPrefixWorkspace:
    """Device memory of the op, shared by all layers and batch sizes of one stream; the work list is `plan`'s."""

    table: torch.Tensor  # int32, one copy from the host: the five below are views of it
    num_items: torch.Tensor  # [1] int32
    shared_len: torch.Tensor  # [max_batch] int32, leading tokens of each batch entry that its group attends
    members: torch.Tensor  # [max_batch] int32, batch entries, group after group
    entries: torch.Tensor  # [max_batch, 4] int32, of each batch entry: first item, splits, first row in the tile, 0
    items: torch.Tensor  # [N, 5] int32, fields of `SharedItem`
    slots: torch.Tensor  # [num_slots] int32, slots of the shared prefixes, group after group: see `shared_slots.py`
    partial_o: torch.Tensor  # [H, N, tile_rows, D] float32
    partial_lse2: torch.Tensor  # [H, N, tile_rows] float32
    group_size: int  # query heads per KV head
    num_multiprocessors: int
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
        """Allocate for batches up to `max_batch`, empty."""
        G = num_q_heads // layout.num_kv_heads
        assert tuning.tile_rows >= G, "a tile must hold the query heads of a request"
        on_gpu = torch.device(device).type == "cuda"
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 1
        max_items = most_items(layout, num_q_heads, max_batch, tuning, multiprocessors)
        shapes = workspace_shapes(layout, max_batch, max_items, tuning)
        memory = {name: torch.zeros(shape, dtype=kind, device=device) for name, (shape, kind) in shapes.items()}
        num_items, shared_len, members, entries, items = memory["table"].split(table_parts(max_batch, max_items))
        return cls(
            **memory,
            num_items=num_items,
            shared_len=shared_len,
            members=members,
            entries=entries.view(max_batch, ENTRY_FIELDS),
            items=items.view(max_items, ITEM_FIELDS),
            group_size=G,
            num_multiprocessors=multiprocessors,
            tuning=tuning,
        )

    @property
    def max_items(self) -> int:
        """Most work items of one plan."""
        return self.items.shape[0]

    @property
    def num_bytes(self) -> int:
        """Device memory of the workspace, in bytes."""
        tensors = (self.table, self.slots, self.partial_o, self.partial_lse2)
        return sum(t.numel() * t.element_size() for t in tensors)

    def plan(self, groups: Sequence[PrefixGroup]) -> torch.Tensor:
        """Replace the work list; returns the shared tokens of each batch entry, [max_batch] int32 on the host.

        The groups together have at most as many tokens as the pool has slots.
        Guarantees: no sync; the copy is ordered on the current stream.
        """
        max_batch, tile_members = self.shared_len.numel(), self.tuning.tile_rows // self.group_size
        members = [entry for group in groups for entry in group.members]
        # splits for one program per multiprocessor: more of them cost more to join than they gain
        items = cut_groups(groups, tile_members, self.num_multiprocessors // self.partial_o.shape[0])
        assert len(items) <= self.max_items, "more work items than the workspace was allocated for"
        assert sum(group.num_tokens for group in groups) <= self.slots.numel(), "more shared tokens than slots"
        shared_len = [0] * max_batch
        for group in groups:
            for entry in group.members:
                shared_len[entry] = group.num_tokens
        places = [[0] * ENTRY_FIELDS for _ in range(max_batch)]
        for i, item in enumerate(items):
            for place, entry in enumerate(members[item.first_member : item.first_member + item.num_members]):
                first_item = i if item.start == 0 else places[entry][0]
                places[entry] = [first_item, places[entry][1] + 1, place * self.group_size, 0]
        flat = [field for row in (*places, *items) for field in row]
        values = [len(items), *shared_len, *members, *[0] * (max_batch - len(members)), *flat]
        values += [0] * (self.table.numel() - len(values))
        # from pinned memory, which PyTorch keeps until the copy is done, the host does not wait
        host = torch.tensor(values, dtype=torch.int32, pin_memory=self.table.is_cuda)
        self.table.copy_(host, non_blocking=True)
        return host[1 : 1 + max_batch]


def most_items(layout: PoolLayout, num_q_heads: int, max_batch: int, tuning: SharedTuning, multiprocessors: int) -> int:
    """Most work items of one plan."""
    # a group has two members at least, which small tiles may separate
    members = tuning.tile_rows // (num_q_heads // layout.num_kv_heads)
    max_tiles = max(1, max_batch // 2) if members > 2 else max_batch
    return max_tiles + triton.cdiv(multiprocessors, layout.num_kv_heads)


def table_parts(max_batch: int, max_items: int) -> tuple[int, ...]:
    """Elements of the five views of `SharedPrefixWorkspace.table`, in their order."""
    return 1, max_batch, max_batch, max_batch * ENTRY_FIELDS, max_items * ITEM_FIELDS


def workspace_shapes(
    layout: PoolLayout, max_batch: int, max_items: int, tuning: SharedTuning
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of the tensors of a `SharedPrefixWorkspace` that are no views."""
    H, D = layout.num_kv_heads, layout.head_dim
    return {
        "table": ((sum(table_parts(max_batch, max_items)),), torch.int32),
        "slots": ((layout.num_slots,), torch.int32),
        "partial_o": ((H, max_items, tuning.tile_rows, D), torch.float32),
        "partial_lse2": ((H, max_items, tuning.tile_rows), torch.float32),
    }


def cut_groups(groups: Sequence[PrefixGroup], tile_members: int, target: int) -> list[SharedItem]:
    """Tiles of members, splits of a tile one after the other.

    At least about `target` items, where splits would not become too short.
    """
    tiles: list[SharedItem] = []
    first = first_slot = 0
    for group in groups:
        size, tokens = len(group.members), group.num_tokens
        for place in range(0, size, tile_members):
            tiles.append(SharedItem(first + place, min(tile_members, size - place), 0, tokens, first_slot))
        first += size
        first_slot += tokens
    longest = max(MIN_SPLIT, -(-sum(tile.end for tile in tiles) // max(1, target)))
    items: list[SharedItem] = []
    for tile in tiles:
        tokens = tile.end
        split = triton.cdiv(triton.cdiv(tokens, triton.cdiv(tokens, longest)), SPLIT_ALIGN) * SPLIT_ALIGN
        items.extend(tile._replace(start=i, end=min(i + split, tokens)) for i in range(0, tokens, split))
    return items
