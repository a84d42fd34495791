"""Grammars of the xgrammar backend on a CPU: SGLang applies their token masks on accelerators only."""

from __future__ import annotations

import torch
import xgrammar
from sglang.srt.constrained.xgrammar_backend import XGrammarGrammar, XGrammarGrammarBackend

WORD_BITS = 32


def apply_vocab_mask(logits: torch.Tensor, vocab_mask: torch.Tensor) -> None:
    """Set the logits of forbidden tokens to minus infinity, in place.

    logits: [bs, vocab]; vocab_mask: [bs, ceil(vocab / 32)] int32, a set bit allows its token. Bits past the vocabulary
    get set.
    """
    words, used_bits = divmod(logits.shape[-1], WORD_BITS)
    if used_bits and words < vocab_mask.shape[-1]:
        # the kernel looks for the next forbidden token without regard to the end of the row, and writes there
        vocab_mask[:, words] |= -1 << used_bits
    xgrammar.apply_token_bitmask_inplace(logits, vocab_mask, backend="cpu")


def _apply_vocab_mask(self: XGrammarGrammar, logits: torch.Tensor, vocab_mask: torch.Tensor) -> None:
    apply_vocab_mask(logits, vocab_mask)


def install() -> None:
    """Let xgrammar's own CPU kernel apply the masks."""
    XGrammarGrammar.apply_vocab_mask = _apply_vocab_mask
    XGrammarGrammarBackend.apply_vocab_mask = staticmethod(apply_vocab_mask)
