"""A decode step of the FlashInfer backend between planning and its last kernel, with FlashInfer's own kernel in torch.

Once a step is planned, SGLang's scheduler may write `req_to_token` while the captured kernels run: it frees the rows of
requests that have ended, and gives them to others. And a capture may follow any step.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from sglang.srt.layers.attention.flashinfer_backend import FlashInferIndicesUpdaterDecode
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from hardkv_sglang.engine.backends import flashinfer as backend_module
from hardkv_sglang.engine.backends.flashinfer import HardKVFlashInferBackend
from hardkv_sglang.kernels import reference
from hardkv_sglang.lifecycle.prefix_groups import PrefixGroup

PREFIX, SPARSE, RECENT_START, SEQ_LEN = 96, 40, 900, 905
LIVING = [1, 2, 4]  # batch entries; entry 0, the first member of the group, and entry 3 have ended


class DenseWrapper:
    """FlashInfer's decode wrapper, by the reference: the page table is its own copy, as FlashInfer's is."""

    def __init__(self, slots: torch.Tensor) -> None:
        self._paged_kv_indices_buf = slots
        self.indptr = torch.zeros(1)

    def plan(self, indptr: torch.Tensor) -> None:
        self.indptr = indptr.clone()

    def forward_return_lse(self, q: torch.Tensor, kv: tuple[torch.Tensor, ...], sm_scale: float) -> reference.State:
        bounds, k, v = self.indptr.tolist(), *kv
        slots = [self._paged_kv_indices_buf[a:b].long() for a, b in itertools.pairwise(bounds)]
        states = [reference.dense_decode(q[i], k, v, own, sm_scale) for i, own in enumerate(slots)]
        return torch.stack([o for o, _ in states]), torch.stack([lse2 for _, lse2 in states]).float()


@dataclass
class Planner:
    """FlashInfer's planner in SGLang, with the signature of the installed release."""

    planned_lens: list[list[int]]
    update_single_wrapper: ClassVar[Any] = FlashInferIndicesUpdaterDecode.update_single_wrapper

    def update(self, *, seq_lens_cpu: torch.Tensor, decode_wrappers: Any, spec_info: Any, **_unused: Any) -> None:
        self.planned_lens.append(seq_lens_cpu.tolist())
        for wrapper in decode_wrappers:
            wrapper.plan(spec_info.kv_indptr)


@dataclass
class Step:
    """A backend over a case's pool, and the batch of its next step."""

    case: Any
    backend: HardKVFlashInferBackend
    planned_lens: list[list[int]]  # KV lengths handed to FlashInfer's planner

    def batch(self, rows: list[int], seq_len: int) -> Any:
        device, size = self.case.k.device, len(rows)
        return SimpleNamespace(
            batch_size=size,
            forward_mode=ForwardMode.DECODE,
            positions=torch.zeros(size),
            req_pool_indices=torch.tensor(rows, device=device),
            seq_lens=torch.full((size,), seq_len, device=device),
            seq_lens_cpu=torch.full((size,), seq_len),
            out_cache_loc=None,
        )

    def plan(self, batch: Any, in_capture: bool = False) -> None:
        """All that runs before SGLang records that the step has read `req_to_token`."""
        self.backend.init_forward_metadata_out_graph(batch, in_capture=in_capture)

    def replay(self, batch: Any, q: torch.Tensor) -> torch.Tensor:
        """The captured kernels, in order; outputs [L, B, HQ * D]."""
        self.backend.init_forward_metadata_in_graph(batch)
        cfg, outputs = self.case.cfg, []
        for index in range(cfg.layout.num_layers):
            layer = SimpleNamespace(
                layer_id=index, tp_q_head_num=cfg.num_q_heads, head_dim=cfg.layout.head_dim, scaling=cfg.softmax_scale
            )
            outputs.append(self.backend.forward_decode(q[index].flatten(1), None, None, layer, batch))
        return torch.stack(outputs)


@pytest.fixture
def step(make_case, monkeypatch: pytest.MonkeyPatch) -> Step:
    """Rows 1 to 5 share a prefix of 96 tokens and have condensed, sparse and recent ones; row 6 is somebody else's."""
    lens = torch.full((2, 7, 1), 70)
    lens[:, 0] = 0
    case = make_case(lens, torch.full_like(lens, SPARSE).masked_fill(lens == 0, 0), spare_pages=16, group=2)
    page, own = case.layout.page_size, case.free_pages.tolist()
    slots = torch.tensor([p * page + i for p in own for i in range(page)], dtype=torch.int32, device=case.k.device)
    for storage in (case.k, case.v):
        storage[:, slots.long()] = torch.randn(2, slots.numel(), 1, 64, device=storage.device)
    case.req_to_token[1:6, :PREFIX] = slots[:PREFIX]
    for row in range(1, 7):
        recent = slots[PREFIX + row * page :][: SEQ_LEN - RECENT_START]
        case.req_to_token[row, RECENT_START:SEQ_LEN] = recent
    case.tables.prefix_end[1:6], case.tables.recent_start[1:6] = PREFIX, RECENT_START
    case.tables.ring_slot[1:4] = torch.arange(3, dtype=torch.int32, device=case.k.device)

    backend = HardKVFlashInferBackend.__new__(HardKVFlashInferBackend)
    backend.enable_deterministic = backend.disable_cuda_graph_kv_split = False
    backend.kv_indptr = [torch.zeros(17, dtype=torch.int32, device=case.k.device)]
    backend.req_to_token_pool = SimpleNamespace(req_to_token=case.req_to_token)
    backend.token_to_kv_pool = SimpleNamespace(
        k_storage=case.k, v_storage=case.v, get_kv_buffer=lambda index: (case.k[index], case.v[index])
    )
    wrapper = DenseWrapper(torch.zeros(16 * 1024, dtype=torch.int32, device=case.k.device))
    planned: list[list[int]] = []
    backend.indices_updater_decode = Planner(planned)
    backend.decode_cuda_graph_metadata = {size: [wrapper] for size in (5, 8, 16)}
    backend.forward_metadata = SimpleNamespace(decode_wrappers=[wrapper])
    backend._prepare_cuda_graph_metadata = lambda *_args: None
    monkeypatch.setattr(backend_module, "fast_decode_plan", lambda *_args: None)
    backend.attach_hardkv(replace(case.cfg, min_shared_tokens=1), case.tables, 16)
    return Step(case, backend, planned)


def announce(step: Step) -> None:
    """What the runtime says about the step to come: five requests, aged tokens, one group."""
    step.backend.set_aged_tokens(torch.full((5,), RECENT_START - PREFIX, dtype=torch.int32))
    step.backend.set_prefix_groups((PrefixGroup(PREFIX, (0, 1, 2, 3, 4)),))


def test_planned_step_reads_no_row_of_another_request(step: Step) -> None:
    """The rows of ended members go to requests with other slots in mid-step: nothing of the living ones changes."""
    case, batch = step.case, step.batch([1, 2, 3, 4, 5], SEQ_LEN)
    q = torch.randn(2, 5, case.cfg.num_q_heads, 64, device=case.k.device)
    announce(step)
    step.plan(batch)
    want = step.replay(batch, q)
    for entry, row in enumerate(batch.req_pool_indices.tolist()):
        for index in range(2):
            dense = torch.cat((case.req_to_token[row, :PREFIX], case.req_to_token[row, RECENT_START:SEQ_LEN])).long()
            args = (case.k[index].double(), case.v[index].double(), dense, case.cfg.softmax_scale)
            parts = reference.dense_decode(q[index, entry].double(), *args), case.oracle(q[index, entry], index, row)
            o, _ = reference.merge_states(*parts)
            assert (want[index, entry].view_as(o).double() - o).norm() <= 1e-5 * o.norm()
    ring = case.tables.query_ring.clone(), case.tables.lse2_ring.clone()
    pool = case.k.clone(), case.v.clone()

    step.plan(batch)
    others = torch.randint(32, case.layout.num_slots, case.req_to_token.shape, device=case.k.device).int()
    living = batch.req_pool_indices[LIVING]
    others[living] = case.req_to_token[living]
    case.req_to_token.copy_(others)
    got = step.replay(batch, q)
    assert torch.equal(got[:, LIVING], want[:, LIVING])
    # rows 2 and 3 are alive and keep ring slots 1 and 2; that of row 1 is nobody else's until a later step
    assert torch.equal(case.tables.query_ring[:, 1:], ring[0][:, 1:])
    assert torch.equal(case.tables.lse2_ring[:, 1:], ring[1][:, 1:])
    assert torch.equal(case.k.nan_to_num(), pool[0].nan_to_num())
    assert torch.equal(case.v.nan_to_num(), pool[1].nan_to_num())


@pytest.mark.parametrize("size", [16, 5])
def test_capture_after_serving_knows_nothing_of_the_last_step(step: Step, size: int) -> None:
    """Graphs captured again after a weight update: every entry is the padding row, one token long."""
    announce(step)
    step.plan(step.batch([1, 2, 3, 4, 5], SEQ_LEN))
    padding = step.batch([0] * size, 1)
    step.plan(padding, in_capture=True)
    assert step.planned_lens[-1] == [1] * size
    want = step.case.tables.query_ring.clone()
    shape = (2, size, step.case.cfg.num_q_heads, 64)
    step.case.k[:, 0], step.case.v[:, 0] = 1.0, 2.0
    output = step.replay(padding, torch.randn(shape, device=want.device))
    assert torch.equal(output, torch.full_like(output, 2.0))
    assert torch.equal(step.case.tables.query_ring, want)
    # and the next step has its groups again
    announce(step)
    step.plan(step.batch([1, 2, 3, 4, 5], SEQ_LEN))
    assert step.planned_lens[-1] == [SEQ_LEN - RECENT_START] * 5
