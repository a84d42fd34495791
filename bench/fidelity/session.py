"""Teacher-forced decode of one request through the real planner, executor, tables and pool.

Between two events the attended set of a request is fixed but for the recent window, which only grows. So all
tokens up to the next event run as one block: each attends the same context, and the block up to itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from bench.fidelity.attention import Context, DenseCache, block_attention, context_attention
from bench.fidelity.model import BlockModel, ModelShape
from bench.fidelity.pool import ROW, PagePool
from hardkv_sglang.config import HardKVConfig
from hardkv_sglang.events.executor import EventExecutor, SettledCounts
from hardkv_sglang.kernels.reference import State, dense_slots, merge_states, ragged_rows_of_layers
from hardkv_sglang.kernels.reference_packed import read_lists
from hardkv_sglang.lifecycle.planner import LifecyclePlanner
from hardkv_sglang.lifecycle.request_state import RequestState
from hardkv_sglang.lifecycle.step_plan import StepPlan
from hardkv_sglang.memory_pool.layout import PoolLayout
from hardkv_sglang.memory_pool.rank_memory import RankMemory
from hardkv_sglang.memory_pool.resolved_config import ResolvedConfig
from hardkv_sglang.memory_pool.tables import DeviceTables

PAGE_SIZE = 32


@dataclass(frozen=True)
class Holding:
    """What the request holds while it decodes the token at `position`."""

    position: int
    held_pages: int  # all its token pages, prompt included
    condensed_pages: int
    condensed_end: int
    recent_start: int
    is_compressed: bool


@dataclass(frozen=True)
class Selected:
    """A select event: kept tokens of every (layer, KV head) list out of `candidates`."""

    seq_len: int
    candidates: int  # positions between the prompt and the recent window
    counts: list[int]  # [L * H]
    kept_mass: float  # attention mass kept, prompt and recent window included, mean over lists


class CompressedSession:
    """One request that decodes under HARD-KV."""

    def __init__(
        self,
        shape: ModelShape,
        options: HardKVConfig,
        max_len: int,
        max_block: int = 256,
        device: torch.device | str = "cpu",
    ) -> None:
        # dense pages of every token, and as many again for what a condense event copies before it frees
        num_slots = (2 * -(-max_len // PAGE_SIZE) + 1) * PAGE_SIZE
        bits = options.survivor_bits
        layout = PoolLayout(
            shape.num_layers, shape.num_kv_heads, shape.head_dim, PAGE_SIZE, num_slots, survivor_bits=bits
        )
        # packed rows take pages as in a server's pool, of 16 bits; it rounds by nothing beside them
        self.pool = PagePool(layout, max_len, device, torch.float32 if bits == 16 else torch.float16)
        self.cfg = ResolvedConfig(options, layout, shape.num_q_heads, shape.softmax_scale, ROW + 1, max_len)
        self.tables = DeviceTables.allocate(self.cfg, torch.float32, device)
        self.planner = LifecyclePlanner(self.cfg)
        pool = self.pool
        memory = RankMemory(self.cfg, self.tables, pool.k_storage, pool.v_storage, pool.req_to_token)
        self.executor = EventExecutor(memory, tp_group=None)
        self.max_block = max_block
        self.seq_len = 0  # tokens with KV in the pool
        self.holdings: list[Holding] = []  # one per decoded token
        self.selected: list[Selected] = []
        self.state: RequestState
        self.ring_slot = -1  # of the device tables, read once after every event
        self.context_rows: torch.Tensor  # [L, H, N] storage rows that the block attends
        self.context_counts: list[list[int]]  # [L][H], of them the first so many
        self.context_mask: torch.Tensor | None  # [L, H, 1, N], on a GPU

    def prefill(self, cache: DenseCache, prompt_len: int) -> None:
        """Take over the first `prompt_len` tokens of a dense cache and admit the request."""
        self.pool.extend_row(0, prompt_len)
        slots = self.pool.req_to_token[ROW, :prompt_len].long()
        self.pool.k_storage[:, slots] = cache.keys[:, :, :prompt_len].transpose(1, 2).to(self.pool.k_storage.dtype)
        self.pool.v_storage[:, slots] = cache.values[:, :, :prompt_len].transpose(1, 2).to(self.pool.v_storage.dtype)
        self.seq_len = prompt_len
        self.state = self.planner.admit(ROW, prompt_len, 0, prompt_len)

    def decode(self, model: BlockModel, tokens: torch.Tensor) -> Iterator[torch.Tensor]:
        """Decode `tokens` ([N]) with the events that a server would run; yields hidden states, block by block."""
        first = self.seq_len
        for position in range(first, first + len(tokens)):
            # as in the scheduler: the step's events are planned, then its slot is allocated
            plan = self.planner.plan([(self.state, position)], self.pool)
            if not plan.is_empty or position - self.seq_len >= self.max_block:
                if position > self.seq_len:
                    yield self._forward(model, tokens[self.seq_len - first : position - first])
                self._run(plan)
            self.pool.extend_row(position, position + 1)
            self.holdings.append(self._holding(position))
        yield self._forward(model, tokens[self.seq_len - first :])

    def _forward(self, model: BlockModel, tokens: torch.Tensor) -> torch.Tensor:
        self._list_context()
        hidden = model.hidden(tokens, self.seq_len, self)
        self.seq_len += len(tokens)
        return hidden

    def _run(self, plan: StepPlan) -> None:
        reports = self.executor.run(plan)
        if self.pool.k_storage.is_cuda:
            torch.cuda.synchronize()  # a server reads the counts two steps later
        self.ring_slot = int(self.tables.ring_slot[ROW])
        for report in reports:
            counts = SettledCounts.read(report)
            self.planner.settle(self.state, counts.head_pages, counts.kept_tokens)
            candidates = report.op.recent_start - report.op.prefix_end
            self.selected.append(Selected(report.op.seq_len, candidates, counts.kept_tokens, counts.kept_mass))
        if plan.condenses:
            self.check()

    def _holding(self, position: int) -> Holding:
        state = self.state
        return Holding(
            position=position,
            held_pages=self.pool.used_pages,
            condensed_pages=state.num_condensed_pages,
            condensed_end=state.condensed_end,
            recent_start=state.recent_start,
            is_compressed=state.is_compressed,
        )

    def check(self) -> None:
        """Prove that every page has exactly one owner. Raises `IntegrityError`."""
        row, state = self.pool.req_to_token[ROW], self.state
        held = {"prompt": row[: state.prefix_end], "dense": row[state.condensed_end : self._allocated_len]}
        if state.num_condensed_pages:
            held["condensed"] = state.condensed_slots
        self.pool.check(held)

    @property
    def _allocated_len(self) -> int:
        return self.cfg.layout.page_ceil(max(self.seq_len, self.state.prefix_end))

    def release(self) -> None:
        """End the request; every page must come back."""
        left = self.planner.release(self.state, self._allocated_len, self.pool)
        self.pool.free_row(ROW, 0, left)
        self.pool.check({})

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """See `BlockAttention.attend`; also fills the observation ring, as the decode backend does."""
        slots = self.pool.req_to_token[ROW, self.seq_len : self.seq_len + k.shape[1]].long()
        self.pool.k_storage[layer, slots] = k.transpose(0, 1).to(self.pool.k_storage.dtype)
        self.pool.v_storage[layer, slots] = v.transpose(0, 1).to(self.pool.v_storage.dtype)
        o, lse2 = self.attend_tiers(layer, q, k, v)
        self._observe(layer, q, lse2)
        return o

    def attend_tiers(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> State:
        """Attention of a block over its request's tiers; shapes as in `block_attention`."""
        pool, rows, head_dim = self.pool, self.context_rows[layer], self.cfg.layout.head_dim
        keys, values = (storage.view(-1, head_dim)[rows].float() for storage in (pool.k_storage, pool.v_storage))
        mask = None if self.context_mask is None else self.context_mask[layer]
        context = Context(keys, values, self.context_counts[layer], mask)
        state = block_attention(q, k, v, context, self.cfg.softmax_scale)
        holds_packed = self.cfg.layout.survivors.is_packed and bool(self.tables.num_condensed[layer, ROW].any())
        return merge_states(self._attend_packed(layer, q), state) if holds_packed else state

    def _attend_packed(self, layer: int, q: torch.Tensor) -> State:
        pool, layout, tables = self.pool, self.cfg.layout, self.tables
        counts = tables.num_condensed[layer, ROW].long()
        index = torch.arange(int(counts.max()), device=q.device).expand(1, len(counts), -1)
        keys, values = read_lists(pool.k_storage, pool.v_storage, layout, tables, slice(layer, layer + 1), ROW, index)
        mask = Context.mask_of(counts, index.shape[-1]) if q.is_cuda else None
        context = Context(keys[0], values[0], counts.tolist(), mask)
        o, lse2 = context_attention(q.reshape(len(counts), -1, q.shape[-1]), context, self.cfg.softmax_scale)
        return o.reshape(q.shape), lse2.reshape(q.shape[:2])

    def _list_context(self) -> None:
        """Rows of what every token of the next block attends: the same for all of them, so looked up once."""
        layout, row_of_slots = self.cfg.layout, self.pool.req_to_token
        slots = dense_slots(row_of_slots, self.tables, ROW, self.seq_len)
        dense = torch.stack([layout.dense_rows(layer, slots) for layer in range(layout.num_layers)])
        ragged, counts = ragged_rows_of_layers(layout, self.tables, row_of_slots, slice(0, layout.num_layers), ROW)
        self.context_rows = torch.cat((dense, ragged), -1)
        counts = counts + len(slots)
        self.context_counts = counts.tolist()
        self.context_mask = Context.mask_of(counts, self.context_rows.shape[-1]) if counts.is_cuda else None

    def _observe(self, layer: int, q: torch.Tensor, lse2: torch.Tensor) -> None:
        window, end, slot = self.cfg.options.query_window, self.seq_len + q.shape[1], self.ring_slot
        if slot < 0:
            return
        first = max(self.seq_len, end - window)
        index = torch.arange(first, end, device=q.device) % window
        block = slice(first - self.seq_len, end - self.seq_len)
        self.tables.query_ring[layer, slot, index] = q[:, block].transpose(0, 1)
        self.tables.lse2_ring[layer, slot, index] = lse2[:, block].T
