"""How far compressed predictions are from dense ones, token by token."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bench.fidelity.attention import DenseCache
from bench.fidelity.model import BlockModel

CHUNK = 256
SCORED = 64  # tokens scored at once: logits of a block are the largest tensors of the benchmark
SCORED_ON_GPU = 128


@dataclass(frozen=True)
class Reference:
    """The dense model on one document."""

    tokens: torch.Tensor  # [N + 1]: prompt, decoded tokens, and the one that the last of them predicts
    prompt_len: int
    cache: DenseCache  # KV of the prompt
    hidden: torch.Tensor  # [N - prompt_len, hidden] final states of the decoded tokens

    @property
    def decoded(self) -> torch.Tensor:
        """Tokens of the decoded part."""
        return self.tokens[self.prompt_len : -1]

    @classmethod
    def build(cls, model: BlockModel, tokens: torch.Tensor, prompt_len: int) -> Reference:
        """Run the dense model over `tokens` but the last."""
        hidden, cache = cls.forward(model, tokens, DenseCache(model.shape, len(tokens) - 1, model.device))
        return cls(tokens, prompt_len, cache.head(prompt_len), hidden[prompt_len:])

    @staticmethod
    def forward(model: BlockModel, tokens: torch.Tensor, cache: DenseCache) -> tuple[torch.Tensor, DenseCache]:
        """Final hidden states of all `tokens` but the last, read through `cache`."""
        hidden = []
        for start in range(0, len(tokens) - 1, CHUNK):
            chunk = tokens[start : min(start + CHUNK, len(tokens) - 1)]
            hidden.append(model.hidden(chunk, start, cache))
            cache.seq_len += len(chunk)
        return torch.cat(hidden), cache


@dataclass(frozen=True)
class TokenScores:
    """Per decoded token: divergence, agreement and surprise."""

    kl: torch.Tensor  # [T] KL(dense || compressed), nats
    agrees: torch.Tensor  # [T] bool, same most likely token
    dense_nll: torch.Tensor  # [T] -log p(next token) of the dense model, nats
    compressed_nll: torch.Tensor  # [T]
    dense_correct: torch.Tensor  # [T] bool, the next token was the most likely
    compressed_correct: torch.Tensor  # [T] bool

    @classmethod
    def compare(cls, dense: torch.Tensor, compressed: torch.Tensor, targets: torch.Tensor) -> TokenScores:
        """dense, compressed: logits [T, V] float32; targets: [T] tokens that come next."""
        # normalisers in float64: their rounding would otherwise be a KL of 1e-6 by itself
        dense_lse, compressed_lse = dense.double().logsumexp(-1), compressed.double().logsumexp(-1)
        weights = (dense - dense_lse[:, None].float()).exp_()
        expected = (weights * (dense - compressed)).sum(-1).double()
        here = targets[:, None]
        dense_top, compressed_top = dense.argmax(-1), compressed.argmax(-1)
        return cls(
            kl=expected - dense_lse + compressed_lse,
            agrees=dense_top == compressed_top,
            dense_nll=dense_lse - dense.gather(1, here)[:, 0],
            compressed_nll=compressed_lse - compressed.gather(1, here)[:, 0],
            dense_correct=dense_top == targets,
            compressed_correct=compressed_top == targets,
        )

    @classmethod
    def of_hidden(
        cls, model: BlockModel, dense: torch.Tensor, compressed: torch.Tensor, targets: torch.Tensor
    ) -> TokenScores:
        """As `compare`, from final hidden states [T, hidden]."""
        size = SCORED_ON_GPU if dense.is_cuda else SCORED
        parts = zip(dense.split(size), compressed.split(size), targets.to(dense.device).split(size), strict=True)
        return cls.join([cls.compare(model.logits(a), model.logits(b), target) for a, b, target in parts])

    @classmethod
    def join(cls, parts: list[TokenScores]) -> TokenScores:
        """Scores of consecutive blocks as one."""
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in cls.__dataclass_fields__))
