"""Inputs of the kernel benchmarks: full-size pools with ragged lists, on the GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hardkv_sglang.config import HardKVConfig
from hardkv_sglang.memory_pool.layout import PoolLayout, head_pages_needed
from hardkv_sglang.memory_pool.resolved_config import ResolvedConfig
from hardkv_sglang.memory_pool.row_format import SCALE_BYTES, RowFormat
from hardkv_sglang.memory_pool.tables import DeviceTables

SHORTEST, LONGEST = 40, 3800  # tokens, as measured on real text (architecture.md section 2)


@dataclass(frozen=True)
class Shape:
    """One benchmark shape; every layer has its own lists and data, so that caches do not carry over."""

    name: str
    batch: int
    uniform: int | None = None  # tokens of every list; None draws ragged lengths
    sparse_share: float = 0.0  # of each list's tokens that are in the sparse tier
    layers: int = 8
    num_q_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 32
    survivor_bits: int = 16

    @property
    def num_lists(self) -> int:
        """Lists per layer."""
        return self.batch * self.num_kv_heads


@dataclass(frozen=True)
class Inputs:
    """Pool, tables and queries of a shape."""

    shape: Shape
    cfg: ResolvedConfig
    tables: DeviceTables
    req_to_token: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    rows: torch.Tensor
    q: torch.Tensor  # [L, B, HQ, D]
    free_pages: torch.Tensor

    @property
    def list_tokens(self) -> float:
        """Mean tokens over the lists of all layers."""
        tables = self.tables
        return float((tables.num_condensed + tables.num_sparse)[:, 1:].double().mean())

    @property
    def layer_bytes(self) -> float:
        """Mean K and V bytes that one layer reads, scales and zeros included."""
        form, tables = self.cfg.layout.survivors, self.tables
        row_bytes = form.row_bytes + SCALE_BYTES * form.is_packed
        tokens = (float(x[:, 1:].double().mean()) for x in (tables.num_condensed, tables.num_sparse))
        return (
            self.shape.num_lists
            * 2
            * sum(n * size for n, size in zip(tokens, (row_bytes, form.chunk_bytes), strict=True))
        )


def draw_lengths(shape: Shape, g: torch.Generator) -> torch.Tensor:
    """[L, B, H] tokens: uniform, or log-normal with median 310 and mean about 560."""
    size = (shape.layers, shape.batch, shape.num_kv_heads)
    if shape.uniform is not None:
        return torch.full(size, shape.uniform)
    return (310 * torch.exp(1.15 * torch.randn(size, generator=g))).long().clamp(SHORTEST, LONGEST)


def fill_packed(storage: torch.Tensor, layout: PoolLayout, pages: torch.Tensor) -> None:
    """Random codes with scale 0.25 and zero -2 into these token pages, in all layers."""
    words = storage.view(torch.int32).view(
        layout.num_layers, -1, layout.page_size, layout.num_kv_heads, layout.head_dim // 2
    )
    size = (layout.num_layers, len(pages), *words.shape[2:])
    words[:, pages.long()] = torch.randint(-(2**31), 2**31 - 1, size, device=storage.device, dtype=torch.int32)
    scale = torch.tensor([0.25, -2.0], dtype=torch.float16).view(torch.int32).item()
    words[:, pages.long(), layout.survivors.first_scale_chunk :] = scale


def build(shape: Shape, spare_pages: int = 0, seed: int = 0) -> Inputs:
    """Allocate and fill everything on the current CUDA device; token pages in random order."""
    g = torch.Generator().manual_seed(seed)
    L, B, H, D, PS = shape.layers, shape.batch, shape.num_kv_heads, shape.head_dim, shape.page_size
    options = HardKVConfig(max_tokens=4096, survivor_bits=shape.survivor_bits)
    form = RowFormat(shape.survivor_bits, D, PS, torch.bfloat16.itemsize)
    lengths = draw_lengths(shape, g)
    span_pages = (options.condense_interval + 2 * options.select_interval) // PS if shape.sparse_share else 0
    num_sparse = (lengths * shape.sparse_share).long().clamp(max=span_pages * PS)
    num_condensed = lengths - num_sparse
    head_pages = head_pages_needed(num_condensed, form.tokens).transpose(0, 1).reshape(B, L * H)
    token_pages = -(-head_pages.sum(1) // (L * H))
    num_pages = 1 + int(token_pages.sum()) + B * span_pages + spare_pages
    layout = PoolLayout(L, H, D, PS, num_pages * PS, shape.survivor_bits)
    cfg = ResolvedConfig(options, layout, shape.num_q_heads, D**-0.5, B + 1, 8192)
    tables = DeviceTables.allocate(cfg, torch.bfloat16, "cpu")
    tables.num_condensed[:, 1:] = num_condensed.int()
    tables.num_sparse[:, 1:] = num_sparse.int()
    tables.first_page[:, 1:] = (head_pages.cumsum(1) - head_pages).view(B, L, H).transpose(0, 1).int()
    tables.condensed_keep.fill_(True)
    order = torch.randperm(num_pages - 1, generator=g) + 1
    req_to_token = torch.zeros(B + 1, max(1024, span_pages * PS), dtype=torch.int32)
    for row in range(1, B + 1):
        own, order = order[: token_pages[row - 1]], order[token_pages[row - 1] :]
        tables.condensed_pages[row, : own.numel()] = own.int()
        dense, order = order[:span_pages], order[span_pages:]
        req_to_token[row, : span_pages * PS] = (dense[:, None] * PS + torch.arange(PS)).flatten().int()
    if span_pages:
        span = tables.sparse_positions.shape[-1]
        index = torch.arange(span) * span_pages * PS // num_sparse[..., None].clamp(min=1)
        tables.sparse_positions[:, 1:] = index.clamp(max=span_pages * PS - 1).int()
    k, v = (torch.randn(L, layout.num_slots, H, D, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    if form.is_packed:
        for storage in (k, v):
            fill_packed(storage, layout, tables.condensed_pages[tables.condensed_pages > 0].cuda())
        tables.key_scale.fill_(1.0)
    on_device = DeviceTables(**{name: getattr(tables, name).cuda() for name in vars(tables)})
    rows = torch.arange(1, B + 1, device="cuda")
    q = torch.randn(L, B, shape.num_q_heads, D, device="cuda", dtype=torch.bfloat16)
    return Inputs(shape, cfg, on_device, req_to_token.cuda(), k, v, rows, q, order.cuda())
