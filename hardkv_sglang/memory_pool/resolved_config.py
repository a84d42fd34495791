"""The options with model and pool known: what every table size derives from."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from hardkv_sglang.config import HardKVConfig
from hardkv_sglang.memory_pool.layout import PoolLayout


@dataclass(frozen=True)
class ResolvedConfig:
    """`HardKVConfig` with the shapes of one rank's model and pool; every table size derives from it.

    Raises `ValueError` when options and layout disagree on the bits of survivors.
    """

    options: HardKVConfig
    layout: PoolLayout
    num_q_heads: int
    softmax_scale: float
    num_rows: int  # rows of req_to_token; row 0 pads CUDA-graph batches and stays empty
    max_context_len: int  # tokens
    min_shared_tokens: int | None = None  # the option, where this server can share prefixes at all; None: never

    def __post_init__(self) -> None:
        if self.layout.survivor_bits != self.options.survivor_bits:
            raise ValueError(
                f"survivor_bits={self.options.survivor_bits}, but the layout is of {self.layout.survivor_bits} bits"
            )

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.num_q_heads // self.layout.num_kv_heads

    @property
    def num_ring_slots(self) -> int:
        """Requests whose queries can be recorded at a time.

        A request needs a slot for `query_window` of every `select_interval` tokens; half as many again let requests
        that started together wait for one another.
        """
        share = self.options.query_window / self.options.select_interval
        return min(self.num_rows - 1, ceil(1.5 * share * (self.num_rows - 1)) + 8)

    @property
    def max_sparse_span(self) -> int:
        """Most positions between the condensed end and the recent window, a multiple of the page size."""
        span = self.options.condense_interval + 2 * self.options.select_interval
        return self.layout.page_ceil(span)

    @property
    def remembers(self) -> bool:
        """Whether tokens keep what select events measured of them."""
        options = self.options
        return options.policy == "hardkv" and options.metric == "output" and options.remembered_weight > 0

    @property
    def remembered_span(self) -> int:
        """Most positions from the condensed end on of which something is remembered, a multiple of the page size."""
        return self.max_sparse_span + self.layout.page_ceil(self.options.recent_tokens)

    @property
    def min_kept_tokens(self) -> int:
        """Tokens that every list keeps, if it has them, however little attention they get."""
        options, everything = self.options, self.layout.page_ceil(self.max_context_len)
        if options.policy == "streaming":
            return options.sink_tokens
        if options.policy != "hardkv" or options.budget == "uniform":
            return options.uniform_tokens
        if options.top_p < 1 or options.kept_share is not None:
            return options.min_tokens
        return everything if options.max_tokens is None else options.max_tokens

    @property
    def max_condensed_tokens(self) -> int:
        """Most condensed tokens of one (layer, KV head) list."""
        context = self.layout.page_ceil(self.max_context_len)
        cap = self.options.max_tokens
        return context if cap is None else min(context, self.layout.page_ceil(cap))

    def pool_tokens(self, condensed_tokens: float) -> float:
        """Tokens of the pool that take as much memory as so many condensed ones."""
        return condensed_tokens * self.layout.page_size / self.layout.head_page_tokens

    @property
    def max_list_tokens(self) -> int:
        """Most condensed and sparse tokens of one (layer, KV head) list."""
        return self.max_condensed_tokens + self.max_sparse_span

    @property
    def max_condensed_pages(self) -> int:
        """Most token pages that one request owns for condensed KV."""
        return -(-self.max_condensed_tokens // self.layout.head_page_tokens)
