"""What a select event scores, read from the tables and the pool: candidates, and how recent queries attended them."""

from __future__ import annotations

import math

import torch

from hardkv_sglang.kernels.reference_packed import read_lists
from hardkv_sglang.lifecycle.step_plan import SelectOp
from hardkv_sglang.memory_pool.rank_memory import RankMemory
from hardkv_sglang.selection.policies.base import Policy
from hardkv_sglang.selection.top_p import Candidates


class CandidateReader:
    """Builds `Candidates` for a policy. Writes nothing and never synchronises."""

    def __init__(self, memory: RankMemory, policy: Policy) -> None:
        self.memory = memory
        self.policy = policy

    def exist(self, entries: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        """`Lists.valid` of lists with these entries [B, N, ...] and padding."""
        return torch.arange(entries.shape[1], device=entries.device)[None, :] >= padding.view(-1, 1)

    def candidates(self, op: SelectOp, layers: slice) -> Candidates:
        """Candidates of these layers' lists: condensed tokens, right-aligned, then the sparse span.

        With a memory, tokens of the recent window up to `op.scanned_end` follow: they are measured, not chosen from.
        """
        padding = self.padding(op, layers)
        keys, values = self.keys_and_values(op, layers, padding)
        queries, lse2 = self.queries(op, layers)
        B, G, Q, D = queries.shape
        queries2 = queries.float().view(B, G * Q, D) * self.scale2
        logits2 = queries2 @ keys.float().transpose(1, 2)
        return Candidates(
            logits2=logits2.view(B, G, Q, -1),
            lse2=lse2,
            attended=self.attended(op, layers),
            valid=self.exist(keys, padding),
            query_valid=torch.ones(Q, dtype=torch.bool, device=keys.device),
            keys=keys if self.policy.needs_keys else None,
            values=values,
        )

    def keys_and_values(
        self, op: SelectOp, layers: slice, padding: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Of the candidates, [B, N, D] each; arbitrary but finite where padded. Packed ones as they are attended.

        Values are those that the policy needs, or None.
        """
        memory, layout, needs_values = self.memory, self.memory.layout, self.policy.needs_values
        if not layout.survivors.is_packed:
            rows = self.rows(op, layers, padding)
            return memory.k_rows[rows], memory.v_rows[rows] if needs_values else None
        rows = self.span_rows(op, layers).flatten(0, 1)
        condensed = read_lists(
            memory.k_storage, memory.v_storage, layout, memory.tables, layers, op.row, self.condensed_index(op, padding)
        )
        k, v = (x.flatten(0, 1) for x in condensed)
        keys = torch.cat((k, memory.k_rows[rows]), 1)
        return keys, torch.cat((v, memory.v_rows[rows]), 1) if needs_values else None

    def padding(self, op: SelectOp, layers: slice) -> torch.Tensor:
        """Entries before the first condensed token of each list, [l, H] int64."""
        return op.condensed_list_bound - self.memory.tables.num_condensed[layers, op.row].long()

    @property
    def scale2(self) -> float:
        """Softmax scale for logits of base 2."""
        return self.memory.cfg.softmax_scale * math.log2(math.e)

    def queries(self, op: SelectOp, layers: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Observation queries [B, G, Q, D] and their base-2 LSE [B, G, Q], both contiguous."""
        cfg, tables = self.memory.cfg, self.memory.tables
        H, G = cfg.layout.num_kv_heads, cfg.group_size
        positions = torch.arange(op.first_query, op.seq_len, device=tables.query_ring.device)
        index = positions % cfg.options.query_window
        queries = tables.query_ring[layers, op.ring_slot][:, index]  # [l, Q, HQ, D]
        Q, D = queries.shape[1], queries.shape[-1]
        queries = queries.view(-1, Q, H, G, D).permute(0, 2, 3, 1, 4).contiguous().view(-1, G, Q, D)
        lse2 = tables.lse2_ring[layers, op.ring_slot][:, index].view(-1, Q, H, G)
        return queries, lse2.permute(0, 2, 3, 1).contiguous().view(-1, G, Q)

    def rows(self, op: SelectOp, layers: slice, padding: torch.Tensor) -> torch.Tensor:
        """Storage rows of the candidates, [B, N] int64; arbitrary but valid where padded."""
        layout, tables = self.memory.layout, self.memory.tables
        index = self.condensed_index(op, padding)
        rows = layout.condensed_rows(
            tables.condensed_pages[op.row],
            tables.first_page[layers, op.row][..., None].expand_as(index),
            index,
        )
        return torch.cat((rows, self.span_rows(op, layers)), -1).flatten(0, 1)

    def condensed_index(self, op: SelectOp, padding: torch.Tensor) -> torch.Tensor:
        """Token of its list at each place before the span, [l, H, bound]; the first token where padded."""
        return (torch.arange(op.condensed_list_bound, device=padding.device) - padding[..., None]).clamp(min=0)

    def span_rows(self, op: SelectOp, layers: slice) -> torch.Tensor:
        """Storage rows of the candidates that have slots of their own, [l, H, S] int64."""
        layout, device = self.memory.layout, self.memory.req_to_token.device
        layer_ids = torch.arange(layout.num_layers, device=device)[layers]
        slots = self.memory.req_to_token[op.row, op.condensed_end : op.scanned_end].long()
        heads = torch.arange(layout.num_kv_heads, device=device)
        return (layer_ids[:, None, None] * layout.num_slots + slots) * layout.num_kv_heads + heads[None, :, None]

    def attended(self, op: SelectOp, layers: slice) -> torch.Tensor:
        """Candidates that the observed queries attended, [B, N] bool; padding counts as attended."""
        tables = self.memory.tables
        old_span = op.old_recent_start - op.condensed_end
        num_sparse = tables.num_sparse[layers, op.row].flatten()
        kept = (tables.sparse_positions[layers, op.row].flatten(0, 1).long() - op.condensed_end)[:, :old_span]
        listed = torch.arange(kept.shape[1], device=kept.device)[None, :] < num_sparse[:, None]
        # one spare column takes what is outside the lists
        old = torch.zeros((kept.shape[0], old_span + 1), dtype=torch.bool, device=kept.device)
        old.scatter_(1, torch.where(listed, kept, old_span), True)
        condensed = old.new_ones((kept.shape[0], op.condensed_list_bound))
        recent = old.new_ones((kept.shape[0], op.scanned_end - op.old_recent_start))
        return torch.cat((condensed, old[:, :old_span], recent), 1)
