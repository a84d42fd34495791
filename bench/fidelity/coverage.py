"""Why budgets behave as they do: attention that an event observed, and attention that came afterwards.

    python -m bench.fidelity.coverage

At one event per document, every rule keeps the same number of tokens over all heads. Printed is what it drops of
the attention of the 32 queries that it saw and of the 256 queries that follow, and the error of the heads' outputs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

import torch
from rich.console import Console
from rich.table import Table

from bench.fidelity.__main__ import load_texts
from bench.fidelity.attention import DenseCache
from bench.fidelity.documents import DOCUMENTS
from bench.fidelity.model import BlockModel, ModelShape
from hardkv_sglang.cli.demo_model import demo_model_path

OBSERVED, FOLLOWING, RECENT = 32, 256, 128
Rule = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
"""Observed and following mass [B, N] and tokens per list on average; returns what is kept, [B, N] bool."""


class QueryCache(DenseCache):
    """A dense cache that also keeps the queries."""

    def __init__(self, shape: ModelShape, max_len: int) -> None:
        super().__init__(shape, max_len)
        self.queries = torch.empty(shape.num_layers, shape.num_q_heads, max_len, shape.head_dim)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """See `BlockAttention.attend`."""
        self.queries[layer, :, self.seq_len : self.seq_len + q.shape[1]] = q
        return super().attend(layer, q, k, v)


def top_uniform(mass: torch.Tensor, budget: int) -> torch.Tensor:
    """The best `budget` candidates of every list."""
    return torch.zeros_like(mass, dtype=torch.bool).scatter_(1, mass.topk(budget, 1).indices, True)


def top_global(mass: torch.Tensor, budget: int) -> torch.Tensor:
    """The best candidates of all lists together: the least mass dropped for the number kept."""
    flat = mass.flatten().topk(budget * mass.shape[0]).indices
    return torch.zeros(mass.numel(), dtype=torch.bool).scatter_(0, flat, True).view_as(mass)


def equal_coverage(mass: torch.Tensor, budget: int) -> torch.Tensor:
    """Top-p: the same dropped mass for every list, found by bisection for the budget."""
    ascending, order = mass.sort(1)
    dropped = ascending.cumsum(1)
    low, high = 0.0, 1.0
    for _ in range(40):
        allowed = (low + high) / 2
        low, high = (allowed, high) if (dropped > allowed).sum() > budget * len(mass) else (low, allowed)
    return torch.zeros_like(mass, dtype=torch.bool).scatter_(1, order, dropped > high)


RULES: dict[str, Rule] = {
    "uniform": lambda seen, _, budget: top_uniform(seen, budget),
    "top-p": lambda seen, _, budget: equal_coverage(seen, budget),
    "threshold": lambda seen, _, budget: top_global(seen, budget),
    "half uniform, half threshold": lambda seen, _, budget: half_and_half(seen, budget),
    "uniform, knowing the future": lambda _, future, budget: top_uniform(future, budget),
    "threshold, knowing the future": lambda _, future, budget: top_global(future, budget),
}


def half_and_half(mass: torch.Tensor, budget: int) -> torch.Tensor:
    """Half the budget for every list alike, the rest where the observed mass is."""
    floor = top_uniform(mass, budget // 2)
    return floor | top_global(mass.masked_fill(floor, 0.0), budget - budget // 2)


def probabilities(cache: QueryCache, layer: int, start: int, end: int) -> torch.Tensor:
    """Attention probabilities of the queries `[start, end)` of one layer, [H, G, Q, end]."""
    shape = cache.shape
    q = cache.queries[layer, :, start:end].view(shape.num_kv_heads, -1, end - start, shape.head_dim)
    logits = q @ cache.keys[layer, :, None, :end].transpose(2, 3) * shape.softmax_scale
    future = torch.arange(end) > torch.arange(start, end)[:, None]
    return logits.masked_fill_(future, -torch.inf).softmax(-1)


def candidate_mass(cache: QueryCache, start: int, end: int, candidates: slice) -> torch.Tensor:
    """Mean mass of the candidates over query heads and queries, [L * H, N]."""
    layers = range(cache.shape.num_layers)
    return torch.cat([probabilities(cache, i, start, end)[..., candidates].mean((1, 2)) for i in layers])


def output_error(cache: QueryCache, keep: torch.Tensor, event: int, candidates: slice) -> float:
    """Relative error of head outputs over the following queries when the rest is dropped, mean over heads."""
    shape, errors = cache.shape, []
    for layer, kept in enumerate(keep.view(shape.num_layers, shape.num_kv_heads, -1)):
        weights = probabilities(cache, layer, event, event + FOLLOWING)
        values = cache.values[layer, :, None, : event + FOLLOWING]
        exact = weights @ values
        weights[..., candidates] *= kept[:, None, None, :]
        approximate = weights @ values / weights.sum(-1, keepdim=True)
        errors.append(((approximate - exact).norm(dim=-1) / exact.norm(dim=-1)).mean())
    return float(torch.stack(errors).mean())


def main(argv: Sequence[str] | None = None) -> int:
    """Print one table per document."""
    parser = argparse.ArgumentParser(prog="python -m bench.fidelity.coverage", description=__doc__)
    parser.add_argument("--documents", nargs="+", default=["novel", "python"], metavar="NAME")
    parser.add_argument("--budget", type=int, default=128, help="tokens per head, on average (default: 128)")
    args = parser.parse_args(argv)
    folder = demo_model_path()
    model, console = BlockModel(folder), Console()
    documents = [document for document in DOCUMENTS if document.name in args.documents]
    for text in load_texts(folder, 1024, 1408, documents, ()):
        console.print(describe(model, text.name, text.tokens, text.prompt_len, args.budget))
    return 0


@torch.inference_mode()
def describe(model: BlockModel, name: str, tokens: torch.Tensor, prompt_len: int, budget: int) -> Table:
    """Every rule on one document, at the latest event that 256 queries follow."""
    size = len(tokens) - 1
    event, cache = size - FOLLOWING, QueryCache(model.shape, size)
    for start in range(0, size, FOLLOWING):
        chunk = tokens[start : min(start + FOLLOWING, size)]
        model.hidden(chunk, start, cache)
        cache.seq_len += len(chunk)
    candidates = slice(prompt_len, event - RECENT)
    seen = candidate_mass(cache, event - OBSERVED, event, candidates)
    later = candidate_mass(cache, event, event + FOLLOWING, candidates)
    table = Table("rule", "kept per head", "observed mass dropped", "later mass dropped", "output error", title=name)
    for rule, choose in RULES.items():
        keep = choose(seen, later, budget)
        lost = [mass.masked_fill(keep, 0.0).sum(1).mean() for mass in (seen, later)]
        error = output_error(cache, keep, event, candidates)
        numbers = f"{keep.sum() / len(keep):.0f}", *(f"{100 * value:.2f} %" for value in lost), f"{100 * error:.2f} %"
        table.add_row(rule, *numbers)
    return table


if __name__ == "__main__":
    sys.exit(main())
