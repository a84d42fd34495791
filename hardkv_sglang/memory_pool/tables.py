"""Per-request device tables: what decode attention and the events read, indexed by `req_pool_idx`.

Every table is written on the forward stream only, by `events/executor.py` (tiers, temperatures) and by the decode
backend (observation rings). Row 0 pads CUDA-graph batches: its lists stay empty.

A captured step may read these while it runs, since what changes them is queued behind it. It may not follow
`req_to_token`, but for the sparse positions of a request's own row: the scheduler's stream writes it meanwhile
(docs/design.md, "What a captured step reads and writes").
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import prod

import torch

from hardkv_sglang.memory_pool.resolved_config import ResolvedConfig


@dataclass(frozen=True)
class DeviceTables:
    """R rows, L layers, H KV heads, W observation queries, O ring slots.

    A row's tokens: dense `[0, prefix_end)`, condensed, sparse, dense `[recent_start, seq_len)`. An
    uncompressed row has `prefix_end = recent_start = 0`, so its dense tier is the whole sequence.
    """

    prefix_end: torch.Tensor  # [R] int32, end of the dense prefix (position)
    recent_start: torch.Tensor  # [R] int32, start of the recent window (position)
    num_condensed: torch.Tensor  # [L, R, H] int32, tokens in the condensed list
    first_page: torch.Tensor  # [L, R, H] int32, first head page of the list in the row's head-page sequence
    condensed_pages: torch.Tensor  # [R, P] int32, token pages that hold the row's head-page sequence
    condensed_keep: torch.Tensor  # [L, R, H, C] bool, condensed tokens that survive the next condense event
    num_sparse: torch.Tensor  # [L, R, H] int32, tokens in the sparse list
    sparse_positions: torch.Tensor  # [L, R, H, S] int32, ascending positions; slot = req_to_token[row, position]
    temperature: torch.Tensor  # [L, R, H] float32, calibrated temperature of the metric
    query_ring: torch.Tensor  # [L, O, W, num_q_heads, head_dim], decode queries (after RoPE) at position % W
    lse2_ring: torch.Tensor  # [L, O, W, num_q_heads] float32, base-2 LSE over all attended tokens
    condensed_energy: torch.Tensor  # [L, R, H, C or 0] bfloat16, mean squared attention of condensed tokens so far
    dense_energy: torch.Tensor  # [L, R, H, E or 0] bfloat16, the same of the dense token at position % E
    key_offset: torch.Tensor  # [L, R, H, D or 0] float32, of packed keys: subtracted before they are quantised
    key_scale: torch.Tensor  # [L, R, H, D or 0] float32, of packed keys: what they are then divided by
    ring_slot: torch.Tensor  # [R] int32, where the backend records the row's queries; -1: nowhere

    @classmethod
    def allocate(cls, cfg: ResolvedConfig, dtype: torch.dtype, device: torch.device | str) -> DeviceTables:
        """Allocate all tables, empty; `dtype` is that of the queries."""
        tables = {
            name: torch.zeros(shape, dtype=kind, device=device)
            for name, (shape, kind) in table_shapes(cfg, dtype).items()
        }
        tables["ring_slot"].fill_(-1)
        return cls(**tables)

    def reset(self, rows: torch.Tensor) -> None:
        """Make `rows` ([N] int64) uncompressed again, in place; no sync."""
        # `index_fill_`: to assign a number by index copies it from the host, which waits for the device
        self.prefix_end.index_fill_(0, rows, 0)
        self.recent_start.index_fill_(0, rows, 0)
        self.num_condensed.index_fill_(1, rows, 0)
        self.num_sparse.index_fill_(1, rows, 0)
        self.ring_slot.index_fill_(0, rows, -1)

    @property
    def num_bytes(self) -> int:
        """Device memory of all tables, in bytes."""
        return sum(getattr(self, f.name).nbytes for f in fields(self))


RINGS = ("query_ring", "lse2_ring")


def table_shapes(cfg: ResolvedConfig, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every table; `dtype` is that of the queries."""
    L, H, R = cfg.layout.num_layers, cfg.layout.num_kv_heads, cfg.num_rows
    W, HQ, D, S = cfg.options.query_window, cfg.num_q_heads, cfg.layout.head_dim, cfg.num_ring_slots
    packed_dim = D if cfg.layout.survivors.is_packed else 0
    remembered = (cfg.max_condensed_tokens, cfg.remembered_span) if cfg.remembers else (0, 0)
    return {
        "prefix_end": ((R,), torch.int32),
        "recent_start": ((R,), torch.int32),
        "num_condensed": ((L, R, H), torch.int32),
        "first_page": ((L, R, H), torch.int32),
        "condensed_pages": ((R, cfg.max_condensed_pages), torch.int32),
        "condensed_keep": ((L, R, H, cfg.max_condensed_tokens), torch.bool),
        "num_sparse": ((L, R, H), torch.int32),
        "sparse_positions": ((L, R, H, cfg.max_sparse_span), torch.int32),
        "temperature": ((L, R, H), torch.float32),
        "query_ring": ((L, S, W, HQ, D), dtype),
        "lse2_ring": ((L, S, W, HQ), torch.float32),
        "condensed_energy": ((L, R, H, remembered[0]), torch.bfloat16),
        "dense_energy": ((L, R, H, remembered[1]), torch.bfloat16),
        "key_offset": ((L, R, H, packed_dim), torch.float32),
        "key_scale": ((L, R, H, packed_dim), torch.float32),
        "ring_slot": ((R,), torch.int32),
    }


def table_bytes(cfg: ResolvedConfig, dtype: torch.dtype) -> tuple[int, int]:
    """Device memory that `DeviceTables.allocate` will take, in bytes: without the observation rings, and they."""
    sizes = {name: prod(shape) * kind.itemsize for name, (shape, kind) in table_shapes(cfg, dtype).items()}
    rings = sum(sizes[name] for name in RINGS)
    return sum(sizes.values()) - rings, rings
