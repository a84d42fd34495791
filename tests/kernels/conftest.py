"""Device choice and inputs of the kernel tests.

With a CUDA device the same tests run compiled, plus those marked `gpu`; else under the Triton interpreter, which
`tests/conftest.py` turns on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from hardkv_sglang.config import HardKVConfig
from hardkv_sglang.kernels import reference
from hardkv_sglang.kernels.packed_rows import PackedRows
from hardkv_sglang.kernels.reference_packed import store
from hardkv_sglang.memory_pool.layout import PoolLayout, head_pages_needed
from hardkv_sglang.memory_pool.resolved_config import ResolvedConfig
from hardkv_sglang.memory_pool.row_format import RowFormat
from hardkv_sglang.memory_pool.tables import DeviceTables

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Case:
    """A pool whose unused rows hold NaN, and tables with given list lengths over it."""

    cfg: ResolvedConfig
    tables: DeviceTables
    req_to_token: torch.Tensor  # [R, T] int32
    k: torch.Tensor  # [L, S, H, D]
    v: torch.Tensor
    free_pages: torch.Tensor  # token pages nobody uses

    @property
    def layout(self) -> PoolLayout:
        return self.cfg.layout

    def oracle(self, q: torch.Tensor, layer: int, row: int) -> reference.State:
        """Float64 state of one request over its lists. q: [HQ, D]."""
        if self.layout.survivors.is_packed:
            k, v = self.k.clone(), self.v.clone()  # their bytes must stay
            for storage in (k, v):
                storage[:, : self.layout.page_size] = 0  # behind a list's end the padding page is read
        else:
            k, v = (x.double().nan_to_num(nan=0.0) for x in (self.k, self.v))
        scale = self.cfg.softmax_scale
        return reference.ragged_decode(q.double(), k, v, self.layout, self.tables, self.req_to_token, layer, row, scale)

    def copy(self) -> Case:
        """A deep copy."""
        tables = DeviceTables(**{name: getattr(self.tables, name).clone() for name in vars(self.tables)})
        return replace(self, tables=tables, k=self.k.clone(), v=self.v.clone())


def build_case(
    num_condensed: torch.Tensor,
    num_sparse: torch.Tensor,
    *,
    group: int = 4,
    head_dim: int = 64,
    page_size: int = 32,
    dtype: torch.dtype = torch.float32,
    spare_pages: int = 0,
    survivor_bits: int = 16,
    seed: int = 0,
    device: str = DEVICE,
) -> Case:
    """Random pool and tables. num_condensed, num_sparse: [L, R, H] list lengths; row 0 must be empty."""
    g = torch.Generator().manual_seed(seed)
    L, R, H = num_condensed.shape
    per_page = RowFormat(survivor_bits, head_dim, page_size, dtype.itemsize).tokens
    pages = head_pages_needed(num_condensed.long(), per_page).transpose(0, 1).reshape(R, L * H)
    pages_per_row = -(-pages.sum(1) // (L * H))
    most = max(256, int((num_condensed + num_sparse).max()))
    options = HardKVConfig(max_tokens=most, select_interval=128, remembered_weight=0.5, survivor_bits=survivor_bits)
    span_pages = options.condense_interval // page_size + 2 * options.select_interval // page_size
    num_pages = 1 + int(pages_per_row.sum()) + R * span_pages + spare_pages
    layout = PoolLayout(L, H, head_dim, page_size, num_pages * page_size, survivor_bits, dtype.itemsize)
    cfg = ResolvedConfig(options, layout, H * group, head_dim**-0.5, R, 4096)
    tables = DeviceTables.allocate(cfg, dtype, "cpu")
    tables.num_condensed.copy_(num_condensed)
    tables.num_sparse.copy_(num_sparse)
    tables.first_page.copy_((pages.cumsum(1) - pages).view(R, L, H).transpose(0, 1))
    tables.condensed_keep.copy_(torch.rand(tables.condensed_keep.shape, generator=g) < 0.4)
    for energy in (tables.condensed_energy, tables.dense_energy):
        energy.copy_(torch.rand(energy.shape, generator=g))
    order = torch.randperm(num_pages - 1, generator=g) + 1
    span = tables.sparse_positions.shape[-1]
    req_to_token = torch.zeros(R, 1024, dtype=torch.int32)
    for row in range(R):
        own, order = order[: pages_per_row[row]], order[pages_per_row[row] :]
        tables.condensed_pages[row, : own.numel()] = own.int()
        dense, order = order[:span_pages], order[span_pages:]
        slots = (dense[:, None] * page_size + torch.arange(page_size)).flatten()
        req_to_token[row, 100 : 100 + span] = slots[torch.randperm(span, generator=g)].int()
    ranks = torch.rand(L, R, H, span, generator=g).argsort(-1)
    for index in torch.cartesian_prod(torch.arange(L), torch.arange(R), torch.arange(H)).tolist():
        n = int(num_sparse[tuple(index)])
        tables.sparse_positions[tuple(index)][:n] = ranks[tuple(index)][:n].sort().values.int() + 100
    k, v = (torch.full((L, layout.num_slots, H, head_dim), torch.nan, dtype=dtype) for _ in range(2))
    for layer in range(L):
        for row in range(R):
            used, counts = reference.ragged_rows(layout, tables, req_to_token, layer, row)
            used = used[torch.arange(used.shape[1])[None, :] < counts[:, None]]
            for storage in (k, v):
                storage.view(-1, head_dim)[used] = torch.randn(used.numel(), head_dim, generator=g).to(dtype)
    if layout.survivors.is_packed:
        fill_packed(layout, tables, k, v, g)
    on_device = {name: getattr(tables, name).to(device) for name in vars(tables)}
    return Case(cfg, DeviceTables(**on_device), req_to_token.to(device), k.to(device), v.to(device), order.to(device))


def fill_packed(layout: PoolLayout, tables: DeviceTables, k: torch.Tensor, v: torch.Tensor, g: torch.Generator) -> None:
    """Random packed rows for all condensed tokens, and offsets and scales for all lists."""
    tables.key_offset.copy_(torch.randn(tables.key_offset.shape, generator=g) * 5)
    tables.key_scale.copy_(torch.rand(tables.key_scale.shape, generator=g) + 0.5)
    for layer, row, head in tables.num_condensed.nonzero().tolist():
        index = torch.arange(int(tables.num_condensed[layer, row, head]))
        first = tables.first_page[layer, row, head].expand_as(index)
        places = layout.packed_rows(tables.condensed_pages[row], first, index)
        for storage in (k, v):
            rows = torch.randn(len(index), layout.head_dim, generator=g)
            store(storage, layout, places, PackedRows.quantise(rows, layout.survivor_bits))


@pytest.fixture
def make_case() -> Callable[..., Case]:
    """`build_case`, as a fixture: test folders are not packages."""
    return build_case


@pytest.fixture
def device() -> str:
    """Where the kernels run."""
    return DEVICE


@pytest.fixture(autouse=True)
def poison_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `torch.empty` return NaN (a large number for integers), so that an unwritten element fails."""
    stock = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        x = stock(*args, **kwargs)
        return x.fill_(torch.nan if x.is_floating_point() else 99)

    monkeypatch.setattr(torch, "empty", poisoned)
