"""The definitions of the selection rule, written out naively: float64, one list at a time, no torch.

Independent of the package: nothing here is shared with the code under test. A token is an index of its list.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import Decimal, localcontext

from hardkv_sglang.config import HardKVConfig
from hardkv_sglang.selection.top_p import Candidates

Row = list[float]


@dataclass
class OracleList:
    """One list of an event: tokens `tokens` (ascending), queries that exist, nothing else."""

    size: int
    tokens: list[int]
    queries: list[int]
    probabilities: dict[tuple[int, int], tuple[dict[int, float], float]]  # (g, i) -> (token -> P, A)
    keys: dict[int, Row]
    values: dict[int, Row]
    group: int


def lists_of(candidates: Candidates) -> list[OracleList]:
    """Split an event into its lists."""
    logits2, lse2 = candidates.logits2.double().tolist(), candidates.lse2.double().tolist()
    valid, attended = candidates.valid.tolist(), candidates.attended.tolist()
    queries = [i for i, exists in enumerate(candidates.query_valid.tolist()) if exists]
    keys, values = ([] if x is None else x.double().tolist() for x in (candidates.keys, candidates.values))
    result = []
    for b in range(len(valid)):
        tokens = [j for j, exists in enumerate(valid[b]) if exists]
        group = len(logits2[b])
        probabilities = {}
        for g in range(group):
            for i in queries:
                row = {j: logits2[b][g][i][j] for j in tokens}
                inside = [j for j in tokens if attended[b][j]]
                probabilities[g, i] = joint_probabilities(row, lse2[b][g][i], inside)
        key_of, value_of = ({j: x[b][j] for j in tokens} if x else {} for x in (keys, values))
        result.append(OracleList(len(valid[b]), tokens, queries, probabilities, key_of, value_of, group))
    return result


def joint_probabilities(row: dict[int, float], lse2: float, inside: list[int]) -> tuple[dict[int, float], float]:
    """P over all live tokens and A, from 50-digit decimals: no exponent is too large for them."""
    with localcontext() as context:
        context.prec = 50
        p = {j: (Decimal(x) - Decimal(lse2)) * Decimal(2).ln() for j, x in row.items()}
        p = {j: x.exp() for j, x in p.items()}
        always = max(Decimal(0), 1 - sum((p[j] for j in inside), Decimal(0)))
        total = always + sum(p.values(), Decimal(0))
        return {j: float(x / total) for j, x in p.items()}, float(always / total)


def mean_importance(lst: OracleList) -> dict[int, float]:
    """Mean over query heads and queries."""
    rows = list(lst.probabilities.values())
    return {j: sum(p[j] for p, _ in rows) / max(1, len(rows)) for j in lst.tokens}


def distributions(lst: OracleList, group_reduction: str, query_reduction: str) -> list[tuple[dict[int, float], float]]:
    """(token -> mass, always-kept mass) of each distribution; valid queries only."""
    per_query = []
    for i in lst.queries:
        heads = [lst.probabilities[g, i] for g in range(lst.group)]
        per_query.append(reduce_rows(heads, lst.tokens, group_reduction))
    if query_reduction == "union" or not per_query:
        return per_query
    return [reduce_rows(per_query, lst.tokens, query_reduction)]


def reduce_rows(
    rows: list[tuple[dict[int, float], float]], tokens: list[int], how: str
) -> tuple[dict[int, float], float]:
    """Token by token, the always-kept tokens being one more token; a maximum is divided by its sum."""
    if how == "mean":
        return {j: sum(p[j] for p, _ in rows) / len(rows) for j in tokens}, sum(a for _, a in rows) / len(rows)
    mass = {j: max(p[j] for p, _ in rows) for j in tokens}
    always = max(a for _, a in rows)
    total = sum(mass.values()) + always
    return {j: x / total for j, x in mass.items()}, always / total


def best_first(scores: dict[int, float]) -> list[int]:
    """Higher scores first, of equals the later position."""
    return sorted(scores, key=lambda j: (-scores[j], -j))


def top_p_set(mass: dict[int, float], always: float, top_p: float, order: list[int] | None = None) -> set[int]:
    """Add tokens, best first, until they carry `top_p` together with the always-kept mass."""
    kept: list[int] = []
    for j in order if order is not None else best_first(mass):
        if math.fsum([always, *(mass[k] for k in kept)]) >= top_p:
            break
        kept.append(j)
    return set(kept)


def metric_scores(lst: OracleList, mass: dict[int, float], options: HardKVConfig, metric: str) -> dict[int, float]:
    """Score of every token by the named metric, for one distribution."""
    if metric == "attention":
        return dict(mass)
    if metric == "snapkv":
        half = options.pooling_width // 2
        return {j: max(mass[k] for k in lst.tokens if abs(k - j) <= half) for j in lst.tokens}
    redundancy = key_redundancy(lst.keys, lst.tokens, options.rkv_similarity)
    total = sum(mass.values()) or 1.0
    weight = options.rkv_lambda
    z = {j: weight * mass[j] / total - (1 - weight) * redundancy[j] for j in lst.tokens}
    lowest = min(z.values(), default=0.0)
    shifted = {j: z[j] - lowest for j in lst.tokens}
    shifted = {j: x if x >= 1e-6 * abs(lowest) else 0.0 for j, x in shifted.items()}
    norm = sum(shifted.values()) or 1.0
    return {j: x / norm + 1e-10 for j, x in shifted.items()}


def key_redundancy(keys: dict[int, Row], tokens: list[int], similarity: float) -> dict[int, float]:
    """Softmax over j of the mean over i of cos(k_i, k_j), with the full matrix."""

    def cosine(i: int, j: int) -> float:
        dot = sum(x * y for x, y in zip(keys[i], keys[j], strict=True))
        return dot / (math.hypot(*keys[i]) * math.hypot(*keys[j]))

    matrix = {(i, j): 0.0 if i == j else cosine(i, j) for i in tokens for j in tokens}
    for i in tokens:
        similar = [j for j in tokens if matrix[i, j] > similarity]
        if similar:
            matrix[i, max(similar)] = 0.0
    mean = {j: sum(matrix[i, j] for i in tokens) / len(tokens) for j in tokens}
    total = sum(math.exp(x) for x in mean.values())
    return {j: math.exp(x) / total for j, x in mean.items()}


def softmax_at(scores: dict[int, float], temperature: float) -> dict[int, float]:
    """Softmax of ln(score) / T, scores below the smallest normal float32 counting as that."""
    y = {j: math.log(max(x, 2.0**-126)) / temperature for j, x in scores.items()}
    top = max(y.values(), default=0.0)
    weight = {j: math.exp(x - top) for j, x in y.items()}
    total = sum(weight.values())
    return {j: x / total for j, x in weight.items()}


def calibrated_mass_of_target(
    rows: list[tuple[dict[int, float], float]],
    scores: list[dict[int, float]],
    top_p: float,
    temperature: float,
) -> float | None:
    """Mean of A + (1 - A) M(T) over the distributions that need a candidate; None where none does."""
    masses = []
    for (mass, always), score in zip(rows, scores, strict=True):
        count = len(top_p_set(mass, always, top_p))
        if count:
            q = softmax_at(score, temperature)
            masses.append(always + (1 - always) * math.fsum(q[j] for j in best_first(score)[:count]))
    return sum(masses) / len(masses) if masses else None


def bisect_temperature(
    rows: list[tuple[dict[int, float], float]], scores: list[dict[int, float]], top_p: float, limit: float
) -> float | None:
    """Largest T in [1 / limit, limit] at which the target still carries `top_p`; None as above."""
    if calibrated_mass_of_target(rows, scores, top_p, 1.0) is None:
        return None
    low, high = -math.log(limit), math.log(limit)
    for _ in range(60):
        middle = (low + high) / 2
        mass = calibrated_mass_of_target(rows, scores, top_p, math.exp(middle))
        assert mass is not None
        low, high = (middle, high) if mass >= top_p else (low, middle)
    return math.exp(low)


@dataclass
class OracleSelection:
    """What the oracle keeps of one list."""

    keep: set[int]
    chosen: set[int]  # before floor and cap
    kept_mass: float


def select(lst: OracleList, options: HardKVConfig, temperature: float) -> OracleSelection:
    """The hardkv policy at a given temperature (1 for attention and without calibration)."""
    rows = distributions(lst, options.group_reduction, options.query_reduction)
    scores = [metric_scores(lst, mass, options, options.metric) for mass, _ in rows]
    mean = mean_importance(lst)
    if options.top_p == 1.0 or not lst.queries:
        chosen = set(lst.tokens)
    else:
        chosen = set()
        for (mass, always), score in zip(rows, scores, strict=True):
            q = mass if options.metric == "attention" else softmax_at(score, temperature)
            share = 1.0 if options.metric == "attention" else sum(mass.values())
            spread = {j: share * x for j, x in q.items()}
            chosen |= top_p_set(spread, always, options.top_p, best_first(score))
        if options.guarantee == "raw":
            chosen |= top_p_set(mean, 1.0 - sum(mean.values()), options.top_p)
    ranking = rank_tokens(lst, rows, scores)
    cap = len(lst.tokens) if options.max_tokens is None else options.max_tokens
    count = min(max(len(chosen), options.min_tokens), cap, len(lst.tokens))
    best = sorted(lst.tokens, key=lambda j: (j not in chosen, -ranking[j], -j))
    keep = set(best[:count])
    return OracleSelection(keep, chosen, 1.0 - sum(mean[j] for j in lst.tokens if j not in keep))


def rank_tokens(
    lst: OracleList, rows: list[tuple[dict[int, float], float]], scores: list[dict[int, float]]
) -> dict[int, float]:
    """One importance per token: the largest over the distributions, each scaled to its candidates' mass."""
    ranking = dict.fromkeys(lst.tokens, 0.0)
    for (mass, _), score in zip(rows, scores, strict=True):
        scale = 1.0 if len(rows) == 1 else sum(mass.values()) / (sum(score.values()) or 1.0)
        ranking = {j: max(ranking[j], scale * score[j]) for j in lst.tokens}
    return ranking


def expected_energy(lst: OracleList, prior_weight: float) -> dict[int, float]:
    """Observed energy, of which a part is expected on any token, by the distance of its value."""
    observed, distance = output_energy(lst), value_distance(lst)
    total, spread = sum(observed.values()), sum(distance.values()) or 1.0
    return {j: (1 - prior_weight) * observed[j] + prior_weight * total * distance[j] / spread for j in lst.tokens}


def value_distance(lst: OracleList) -> dict[int, float]:
    """|v - mean output|^2 per token."""
    mean = mean_importance(lst)
    total = sum(mean.values()) or 1.0
    width = len(next(iter(lst.values.values()), []))
    output = [sum(mean[j] * lst.values[j][d] for j in lst.tokens) / total for d in range(width)]
    return {j: sum((x - y) ** 2 for x, y in zip(lst.values[j], output, strict=True)) for j in lst.tokens}


def output_energy(lst: OracleList) -> dict[int, float]:
    """Expected squared change of the head's output per dropped token: mean of P^2, times |v - mean output|^2."""
    distance, count = value_distance(lst), lst.group * len(lst.queries)
    square = {j: sum(lst.probabilities[key][0][j] ** 2 for key in lst.probabilities) / count for j in lst.tokens}
    return {j: square[j] * distance[j] for j in lst.tokens}
