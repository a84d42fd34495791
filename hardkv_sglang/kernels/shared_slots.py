"""Slots of the prefixes that groups attend, copied when a step is planned.

The kernels of a captured step may not follow rows of `req_to_token`: SGLang's scheduler may give the row of an ended
member to another request while the step still runs, and the group would attend that request's KV.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl

from hardkv_sglang.kernels.shared_plan import ITEM_FIELDS, SharedPrefixWorkspace


@triton.jit
def shared_slots_kernel(
    rows,
    req_to_token,
    num_items,
    members,
    items,
    slots,
    stride_req,
    FIELDS: tl.constexpr,
    BN: tl.constexpr,
):
    o_n = tl.arange(0, BN)
    # tiles of one group write the same slots
    for i_item in range(tl.program_id(0), tl.load(num_items), tl.num_programs(0)):
        p_item = items + i_item * FIELDS
        # all members have these slots
        row = tl.load(rows + tl.load(members + tl.load(p_item))).to(tl.int64)
        start, end, first_slot = tl.load(p_item + 2), tl.load(p_item + 3), tl.load(p_item + 4)
        for i_n in range(start, end, BN):
            m_n = i_n + o_n < end
            b_slot = tl.load(req_to_token + row * stride_req + i_n + o_n, mask=m_n, other=0)
            tl.store(slots + first_slot + i_n + o_n, b_slot, mask=m_n)


def copy_shared_slots(workspace: SharedPrefixWorkspace, rows: torch.Tensor, req_to_token: torch.Tensor) -> None:
    """Read the slots of the planned groups from the rows of their first members, into the workspace.

    rows: [B] integer, request rows of the step to come; req_to_token: [R, T] int32.
    Call in every step that has groups, on the forward stream, before SGLang records that the step has read
    `req_to_token`. Guarantees: one launch, no allocation, no sync.
    """
    assert req_to_token.stride(1) == 1, "rows of req_to_token must be contiguous"
    shared_slots_kernel[(workspace.num_multiprocessors,)](
        rows,
        req_to_token,
        workspace.num_items,
        workspace.members,
        workspace.items,
        workspace.slots,
        stride_req=req_to_token.stride(0),
        FIELDS=ITEM_FIELDS,
        BN=1024,
        num_warps=4,
    )
