"""How much pool a request will need: its bounded footprint instead of its maximal length."""

from __future__ import annotations

from hardkv_sglang.config import ResolvedConfig
from hardkv_sglang.lifecycle import RequestState

PRIOR_KEPT_FRACTION = 0.3  # share of aged tokens that condensation keeps, until this server has measured it
MEASURED_AFTER = 4096  # scored tokens after which the measured share is trusted


class FootprintEstimator:
    """Expected peak of pool tokens that decoding `n` tokens occupies under compression."""

    def __init__(self, cfg: ResolvedConfig) -> None:
        options, layout = cfg.options, cfg.layout
        # recent window, the sparse span just before it is condensed, and one page in the making
        self.dense_tokens = (
            options.recent_tokens
            + layout.page_ceil(options.select_interval)
            + layout.page_ceil(options.condense_interval)
            + layout.page_size
        )
        self.max_condensed_tokens = cfg.max_condensed_tokens

    def decode_tokens(self, num_tokens: int, kept_fraction: float) -> int:
        """Pool tokens at the peak of decoding `num_tokens` tokens."""
        aged = max(0, num_tokens - self.dense_tokens)
        condensed = min(int(aged * kept_fraction) + 1, self.max_condensed_tokens) if aged else 0
        return min(num_tokens, self.dense_tokens) + condensed

    def growth(self, state: RequestState, seq_len: int, remaining: int, page_size: int, kept: float) -> int:
        """Pool tokens that a running request will still take, beyond what it holds now."""
        held = state.num_condensed_pages * page_size + seq_len - state.condensed_end
        decoded = seq_len - state.prefix_end
        return max(0, self.decode_tokens(decoded + remaining, kept) - held)
