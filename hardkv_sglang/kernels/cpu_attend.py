"""Decode attention over ragged lists of storage rows by PyTorch's own CPU operators.

`reference.py` copies the rows of a list together and attends them, which is the definition. Here K rows are read by a
sampled matrix product and V rows by a weighted embedding bag, for all requests of a batch at once: copying the rows was
half of the time of attention on a CPU, and the number of operations most of the rest.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch.nn.functional import embedding_bag

from hardkv_sglang.kernels import EMPTY_LSE2, reference


@dataclass(frozen=True)
class RaggedRows:
    """Storage rows that each of Q queries attends; query i those in `[indptr[i], indptr[i + 1])`."""

    indptr: torch.Tensor  # [Q + 1] int32
    rows: torch.Tensor  # [N] int32
    query: torch.Tensor  # [N] int32, the query of each row
    logits2: torch.Tensor  # [Q, M] sparse CSR over these rows, in the type of the attention; `attend` writes the values

    @classmethod
    def of(cls, counts: torch.Tensor, rows: torch.Tensor, num_rows: int, dtype: torch.dtype) -> RaggedRows:
        """Lists of `counts` [Q] storage rows, one after the other in `rows` [N], of a storage of M = `num_rows`.

        dtype: of the attention, float32 or float64. CPU tensors of integers.
        """
        indptr = torch.zeros(counts.numel() + 1, dtype=torch.int32)
        torch.cumsum(counts, 0, out=indptr[1:])
        rows = rows.int()
        query = torch.repeat_interleave(torch.arange(counts.numel(), dtype=torch.int32), counts)
        with warnings.catch_warnings():
            # that this type is young is known; that its invariants hold is tested
            warnings.filterwarnings("ignore", message="Sparse", category=UserWarning)
            logits2 = torch.sparse_csr_tensor(
                indptr, rows, torch.zeros(rows.numel(), dtype=dtype), (counts.numel(), num_rows), check_invariants=False
            )
        return cls(indptr, rows, query, logits2)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lists: RaggedRows, scale: float) -> reference.State:
    """Attention of Q query vectors, each over its list.

    q: [Q, D]; k, v: [M, D], storage rows. Returns o [Q, D] and lse2 [Q] in the type of the attention; an empty list
    gives zeros and `EMPTY_LSE2`. Deterministic. CPU tensors.
    """
    kind = lists.logits2.dtype
    if lists.rows.numel() == 0:
        return q.new_zeros(q.shape, dtype=kind), q.new_full(q.shape[:1], EMPTY_LSE2, dtype=kind)
    if k.dtype != kind:
        # the operators below have no half precision
        k, v = (x.index_select(0, lists.rows).to(kind) for x in (k, v))
        lists = RaggedRows.of(lists.indptr.diff(), torch.arange(k.shape[0]), k.shape[0], kind)
    lists.logits2.values().zero_()  # `beta` 0 keeps a NaN of the call before
    torch.sparse.sampled_addmm(
        lists.logits2, q.to(kind), k.t(), beta=0.0, alpha=scale * math.log2(math.e), out=lists.logits2
    )
    logits2 = lists.logits2.values()
    top = torch.segment_reduce(logits2, "max", offsets=lists.indptr, initial=EMPTY_LSE2)
    weights = torch.exp2(logits2 - top.index_select(0, lists.query))
    total = torch.segment_reduce(weights, "sum", offsets=lists.indptr)
    o = embedding_bag(lists.rows, v, lists.indptr, mode="sum", per_sample_weights=weights, include_last_offset=True)
    o /= total.clamp(min=torch.finfo(kind).tiny)[:, None]
    return o, torch.where(total > 0, top + torch.log2(total), EMPTY_LSE2)
