"""Publication of a select event, one program per list: `reference_publish.py` is the specification."""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl

from hardkv_sglang.lifecycle.step_plan import SelectOp
from hardkv_sglang.memory_pool.tables import DeviceTables


# positions and bounds differ from event to event: specialising on them would compile in the middle of serving
@triton.jit(do_not_specialize=["row", "op_prefix_end", "op_recent_start", "condensed_end", "bound", "N"])
def publish_kernel(
    keep,
    prefix_end,
    recent_start,
    ring_slot,
    num_condensed,
    condensed_keep,
    num_sparse,
    sparse_positions,
    num_kept,
    row,
    op_prefix_end,
    op_recent_start,
    condensed_end,
    bound,
    N,
    num_rows,
    capacity,
    max_span,
    H: tl.constexpr,
    BN: tl.constexpr,
):
    i_b = tl.program_id(0)
    o_table = ((i_b // H).to(tl.int64) * num_rows + row) * H + i_b % H
    padding = bound - tl.load(num_condensed + o_table)
    p_keep = keep + i_b.to(tl.int64) * N
    o_n = tl.arange(0, BN)
    b_kept = tl.zeros([BN], tl.int32)
    # condensed tokens stand at the right of their columns, and at the left of the table
    for i_n in range(0, bound, BN):
        o_source = i_n + o_n + padding
        b_keep = tl.load(p_keep + o_source, mask=o_source < bound, other=0)
        tl.store(condensed_keep + o_table * capacity + i_n + o_n, b_keep, mask=i_n + o_n < bound)
        b_kept += b_keep.to(tl.int32)
    # sparse tokens in ascending position
    listed = 0
    for i_n in range(bound, N, BN):
        b_keep = tl.load(p_keep + i_n + o_n, mask=i_n + o_n < N, other=0).to(tl.int32)
        b_index = listed + tl.cumsum(b_keep, 0) - 1
        b_position = condensed_end + (i_n - bound) + o_n
        tl.store(sparse_positions + o_table * max_span + b_index, b_position, mask=b_keep != 0)
        listed += tl.sum(b_keep, 0)
    tl.store(num_sparse + o_table, listed)
    tl.store(num_kept + i_b, tl.sum(b_kept, 0) + listed)
    if i_b == 0:
        tl.store(prefix_end + row, op_prefix_end)
        tl.store(recent_start + row, op_recent_start)
        tl.store(ring_slot + row, -1)


def publish(tables: DeviceTables, op: SelectOp, keep: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """See `reference_publish.publish`. Two launches, no sync; places behind a list's tokens keep what they held."""
    L, num_rows, H, capacity = tables.condensed_keep.shape
    assert keep.is_contiguous() and keep.shape[0] == L * H, "keep [L * H, N] must be contiguous"
    num_kept = torch.empty(L, H, dtype=torch.int32, device=keep.device)
    N = keep.shape[1]
    publish_kernel[(L * H,)](
        keep.view(torch.uint8), tables.prefix_end, tables.recent_start, tables.ring_slot, tables.num_condensed,
        tables.condensed_keep.view(torch.uint8), tables.num_sparse, tables.sparse_positions, num_kept, op.row,
        op.prefix_end, op.recent_start, op.condensed_end, op.condensed_list_bound, N, num_rows, capacity,
        tables.sparse_positions.shape[-1], H=H, BN=1024, num_warps=4,
    )  # fmt: skip
    tables.temperature[:, op.row] = temperature.view(L, H)
    return num_kept
