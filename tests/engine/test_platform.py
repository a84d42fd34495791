"""The CPU platform: complete, and active only where nothing else can serve."""

from __future__ import annotations

import contextlib
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from sglang.srt.mem_cache.memory_pool import KVCache
from sglang.srt.platforms.device_mixin import DeviceMixin
from sglang.srt.platforms.interface import SRTPlatform

from hardkv_sglang.engine.compat import allocates_pages_in_torch
from hardkv_sglang.engine.platform import activate as activation
from hardkv_sglang.engine.platform import grammar, pinning
from hardkv_sglang.engine.platform.cpu import TorchCpuPlatform

ROOT = Path(__file__).parents[2]


class Method(NamedTuple):
    """How SGLang calls a method of the interface, and what it needs of the value."""

    is_right: Callable[[Any], bool]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = MappingProxyType({})


def default_args(**given: Any) -> SimpleNamespace:
    """The server arguments that the platform looks at."""
    return SimpleNamespace(**{"lora_backend": "csgmv", "enable_torch_compile": False, **given})


def is_none(value: Any) -> bool:
    return value is None


def is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def is_true(value: Any) -> bool:
    return value is True


def is_false(value: Any) -> bool:
    return value is False


def is_pool(value: Any) -> bool:
    return issubclass(value, KVCache)


def is_byte_count(value: Any) -> bool:
    return 2**20 < value < 2**60


# one row per public method of SRTPlatform in any release: a later one that adds another fails here
INTERFACE = {
    "apply_server_args_defaults": Method(is_none, (default_args(),)),
    "empty_cache": Method(is_none),
    "get_available_memory": Method(lambda v: len(v) == 2 and v[0] <= v[1]),
    "get_communicator_class": Method(is_none),  # None is SGLang's default
    "get_compile_backend": Method(is_text, (None,)),
    "get_cpu_architecture": Method(lambda v: v is not None),
    "get_current_memory_usage": Method(is_byte_count),
    "get_default_attention_backend": Method(lambda v: v == "torch_native"),
    "get_device": Method(lambda v: v == "cpu", (0,)),
    "get_device_capability": Method(is_none),  # None: not applicable
    "get_device_name": Method(is_text),
    "get_device_total_memory": Method(is_byte_count),
    "get_device_uuid": Method(is_text),
    "get_dispatch_key_name": Method(lambda v: v == "native"),
    "get_dsa_kv_pool_cls": Method(is_pool),
    "get_mha_kv_pool_cls": Method(is_pool),
    "get_mla_kv_pool_cls": Method(is_pool),
    # since 0.5.22 SGLang's own allocator does without Triton
    "get_paged_allocator_cls": Method(lambda v: is_none(v) if allocates_pages_in_torch() else inspect.isclass(v)),
    "get_quantization_config": Method(is_none, ("fp8",)),  # None is SGLang's default
    "get_torch_distributed_backend_str": Method(lambda v: v == "gloo"),
    "get_torch_profiler_activity": Method(lambda v: v is torch.profiler.ProfilerActivity.CPU),
    "get_torch_profiler_activity_str": Method(lambda v: is_text(v) and v not in ("CPU", "GPU")),
    "inference_mode": Method(lambda v: v is not None),
    "init_backend": Method(is_none),
    "is_cpu": Method(is_false),  # that is SGLang's own CPU platform
    "is_cuda": Method(is_false),
    "is_cuda_alike": Method(is_false),
    "is_mps": Method(is_false),
    "is_musa": Method(is_false),
    "is_npu": Method(is_false),
    "is_out_of_tree": Method(is_true),
    "is_pin_memory_available": Method(is_false, ("cpu",)),
    "is_rocm": Method(is_false),
    "is_tpu": Method(is_false),
    "is_xpu": Method(is_false),
    "seed_everything": Method(is_none, (None,)),
    "set_device": Method(is_none, (torch.device("cpu"),)),
    "support_cuda_graph": Method(is_false),
    "support_piecewise_cuda_graph": Method(is_false),
    "supports_fp8": Method(is_false),
    "synchronize": Method(is_none),
    "verify_quantization": Method(is_none, ("fp8",)),
    # since 0.5.22
    "cpu_arch": Method(lambda v: v is not None),
    "get_full_graph_backend_cls": Method(is_none),
    "get_group_coordinator_device": Method(lambda v: v == torch.device("cpu"), (0,)),
    "get_kv_pool_cls": Method(is_pool, kwargs={"kind": "mha"}),
    "get_speculative_cache_locs_fn": Method(is_none),
    "get_speculative_graph_runner_cls": Method(is_none, ("EAGLE", "draft_decode")),
    "get_speculative_worker_cls": Method(is_none, ("EAGLE",)),
    "is_sail": Method(is_false),
    "post_load_model": Method(is_none, (None,)),
    "reindex_device_id": Method(lambda v: v is not None, (0,)),
    "support_mamba_cache_extra_buffer": Method(is_false),
    "supports_speculative_algorithm": Method(is_false, ("EAGLE",)),
    "supports_speculative_draft_attention_backend": Method(is_false, ("EAGLE", "torch_native")),
}
# never asked for: the flags that lead there are refused or off
UNREACHABLE = {
    "get_graph_runner_cls": "--enable-torch-compile is refused",
    "get_piecewise_backend_cls": "support_piecewise_cuda_graph is False",
    "get_default_speculative_draft_attention_backend": "supports_speculative_algorithm is False",
}


@pytest.fixture
def stock_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo afterwards what `init_backend` changes in this process."""
    from sglang.srt.constrained.xgrammar_backend import XGrammarGrammar, XGrammarGrammarBackend
    from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

    for owner, name in ((XGrammarGrammar, "apply_vocab_mask"), (XGrammarGrammarBackend, "apply_vocab_mask")):
        monkeypatch.setattr(owner, name, vars(owner)[name])
    monkeypatch.setattr(UnquantizedLinearMethod, "apply", UnquantizedLinearMethod.apply)
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.pin_memory)
    for module in pinning.PINNING_MODULES:
        monkeypatch.setattr(f"{module}.torch", torch)


def public_methods(cls: type) -> set[str]:
    return {name for name, _ in inspect.getmembers(cls, inspect.isroutine) if not name.startswith("_")}


def test_the_table_names_the_whole_interface() -> None:
    assert public_methods(SRTPlatform) | public_methods(DeviceMixin) <= set(INTERFACE) | set(UNREACHABLE)


@pytest.mark.parametrize("name", INTERFACE)
def test_method(stock_layers: None, name: str) -> None:
    row, member = INTERFACE[name], getattr(TorchCpuPlatform(), name, None)
    if member is None:
        pytest.skip("not a method of this release")
    assert row.is_right(member(*row.args, **row.kwargs) if callable(member) else member)


def test_triton_lora_becomes_torch_and_a_choice_stays() -> None:
    for given, expected in {"csgmv": "torch_native", "torch_native": "torch_native", "triton": "triton"}.items():
        args = default_args(lora_backend=given)
        TorchCpuPlatform().apply_server_args_defaults(args)
        assert args.lora_backend == expected


def test_compiled_decode_is_refused() -> None:
    with pytest.raises(ValueError, match="remove --enable-torch-compile"):
        TorchCpuPlatform().apply_server_args_defaults(default_args(enable_torch_compile=True))


# ---- latent KV


@pytest.mark.skipif(hasattr(SRTPlatform, "get_kv_pool_cls"), reason="SGLang's own pool serves")
@pytest.mark.parametrize("index_head_dim", [None], ids=str)
def test_mla_pool_takes_the_arguments_of_sglang(index_head_dim: None) -> None:
    pool = TorchCpuPlatform().get_mla_kv_pool_cls()(
        64, page_size=32, dtype=torch.float32, kv_lora_rank=16, qk_rope_head_dim=8, index_head_dim=index_head_dim,
        layer_num=2, device="cpu", enable_memory_saver=False, start_layer=0, end_layer=2,
    )  # fmt: skip
    loc, rows = torch.tensor([33, 70]), torch.randn(2, 1, 24)
    pool.set_kv_buffer(SimpleNamespace(layer_id=1), loc, rows, None)
    assert torch.equal(pool.get_key_buffer(1)[loc], rows)
    assert torch.equal(pool.get_value_buffer(1)[loc], rows[..., :16])


# ---- grammars and pinned memory


@pytest.mark.parametrize("vocab_size", [64, 49152, 49153])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_token_mask(vocab_size: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    allowed = torch.rand(3, vocab_size, generator=g) < 0.3
    allowed[1] = True
    bits = torch.nn.functional.pad(allowed, (0, -vocab_size % 32)).view(3, -1, 32).long()
    words = (bits << torch.arange(32)).sum(-1)
    mask = torch.where(words >= 2**31, words - 2**32, words).int()
    logits = torch.randn(3, vocab_size, generator=g).to(dtype)
    expected = logits.masked_fill(~allowed, float("-inf"))
    grammar.apply_vocab_mask(logits, mask)
    assert torch.equal(logits, expected)


def test_token_mask_writes_nothing_past_a_row() -> None:
    # all allowed, and the unused bits of the last word clear: xgrammar's kernel alone forbids the next row's first
    rows = torch.zeros(2, 40)
    grammar.apply_vocab_mask(rows[:1], torch.tensor([[-1, 2**8 - 1]], dtype=torch.int32))
    assert not rows.any()


@pytest.mark.cpu
def test_memory_that_sglang_pins_is_ordinary(stock_layers: None) -> None:
    from sglang.srt.constrained import xgrammar_backend

    asks_the_platform = "is_pin_memory_available" in vars(xgrammar_backend)  # since 0.5.21 or so
    with contextlib.nullcontext() if asks_the_platform else pytest.raises(RuntimeError):
        xgrammar_backend._allocate_token_bitmask(100, 3)
    pinning.install()
    mask = xgrammar_backend._allocate_token_bitmask(100, 3)
    assert mask.shape == (3, 4) and bool((mask == -1).all())
    tensor = torch.zeros(3)
    assert tensor.pin_memory() is tensor


# modules that pin without asking the platform, and why a CPU server never gets there; the others are in
# pinning.PINNING_MODULES
NOT_ON_A_CPU = {
    "disaggregation": "needs a transfer engine",
    "hardware_backend": "other hardware",
    "kv_canary": "checks on CUDA",
    "layers.attention.deepseek_v4": "other attention backends",
    "layers.moe.moe_runner.deep_gemm": "CUDA kernels",
    "lora.backend.ascend_backend": "Ascend kernels",
    "lora.backend.chunked_backend": "Triton kernels",
    "layers.attention.dots_hybrid_backend": "other attention backends",
    "layers.attention.dsa": "other attention backends",
    "layers.attention.flashinfer_mla_backend": "other attention backends",
    "layers.attention.linear": "other attention backends",
    "layers.attention.qwen_sparse_attn_backend": "other attention backends",
    "layers.engram_staging": "tables that are read by a CUDA device",
    "layers.logprob_processor": "asks the platform first",
    "layers.moe.expert_pack": "experts that are moved to a CUDA device",
    "lora.backend.triton_backend": "Triton kernels",
    "lora.backend.triton_v2_backend": "Triton kernels",
    "lora.lora": "calls Tensor.pin_memory, which is replaced",
    "lora.mem_pool": "asks the platform first",
    "managers.hisparse_coordinator": "on CUDA only",
    "managers.mm_utils": "of a CUDA tensor only",
    "managers.overlap_utils": "on CUDA only",
    "managers.schedule_batch": "Mamba models, which have no torch kernels",
    "managers.utils": "of a CUDA tensor only",
    "mem_cache.embedding_cache_controller": "disaggregation",
    "mem_cache.pool_host": "hierarchical cache, asks the platform first",
    "mem_cache.storage": "hierarchical cache",
    "model_executor.forward_batch_info": "with DP attention only, whose collectives need CUDA",
    "model_executor.encoder_swa_replay": "asks the platform first",
    "models.qwen4_exp_ple_table": "read by Triton kernels",
    "multimodal.processors": "of a CUDA tensor only",
    "sampling.penaltylib.min_new_tokens": "asks the platform first",
    "state_capturer": "routed experts and index top-k, whose recorders are Triton kernels",
    "utils.async_probe": "of a CUDA tensor only",
    "utils.common": "asks the platform first",
    "utils.cuda_vmm_transport_utils": "CUDA transport",
    "utils.offloader": "moves weights of a CUDA device",
    "utils.video_decoder": "asks for a CUDA device first",
}


def test_every_module_that_pins_is_known() -> None:
    import sglang.srt

    (folder,) = map(Path, sglang.srt.__path__)
    pinning_now = {
        ".".join(path.relative_to(folder).with_suffix("").parts)
        for path in folder.rglob("*.py")
        if any(call in path.read_text() for call in ("pin_memory=True", ".pin_memory()"))
    }
    known = {name.removeprefix("sglang.srt.") for name in pinning.PINNING_MODULES}
    assert known <= pinning_now
    unknown = {name for name in pinning_now - known if not name.startswith(tuple(NOT_ON_A_CPU))}
    assert not unknown


def test_every_factory_that_pins_is_replaced() -> None:
    for module in pinning.PINNING_MODULES:
        text = Path(sys.modules[module].__file__ or "").read_text()
        called = re.findall(r"torch\.(\w+)\((?:[^()]|\([^()]*\))*pin_memory=True", text)
        assert set(called) <= set(pinning.FACTORIES)


# ---- when the platform is active

AVAILABLE = SimpleNamespace(is_available=lambda: True)


@pytest.fixture
def bare_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """No accelerator, no other platform plugin, nothing asked for."""
    for name in ("SGLANG_PLATFORM", "SGLANG_PLUGINS", "SGLANG_USE_CPU_ENGINE"):
        monkeypatch.delenv(name, raising=False)
    for kind in ("cuda", "xpu", "accelerator"):
        monkeypatch.setattr(getattr(torch, kind), "is_available", lambda: False)
    monkeypatch.setattr(torch.mps, "is_available", lambda: False)


def test_active_on_a_bare_host(bare_host: None) -> None:
    assert activation.activate() == activation.PLATFORM


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps", "npu", "hpu", "musa", "accelerator"])
def test_stands_aside_for_an_accelerator(bare_host: None, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(torch, kind, AVAILABLE, raising=False)
    assert activation.activate() is None
    monkeypatch.setenv("SGLANG_PLATFORM", "hardkv_cpu")
    assert activation.activate() == activation.PLATFORM


@pytest.mark.parametrize("package", activation.ACCELERATOR_PACKAGES)
def test_stands_aside_for_the_package_of_an_accelerator(
    bare_host: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, package: str
) -> None:
    (tmp_path / f"{package}.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert activation.activate() is None


def test_stands_aside_for_sglangs_cpu_kernels(bare_host: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    assert activation.activate() is None


def install_plugin(folder: Path) -> None:
    """A package with a platform of its own, as pip would leave it."""
    (folder / "other_platform.py").write_text(
        "from sglang.srt.platforms.interface import SRTPlatform\n"
        "class OtherPlatform(SRTPlatform):\n    device_name = 'other'\n"
        "def activate():\n    return 'other_platform.OtherPlatform'\n"
    )
    info = folder / "other_platform-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other-platform\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[sglang.srt.platforms]\nother = other_platform:activate\n")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"SGLANG_PLUGINS": "hardkv,hardkv_cpu,other"}, None),
        ({"SGLANG_PLUGINS": "hardkv,hardkv_cpu"}, activation.PLATFORM),
        ({"SGLANG_PLATFORM": "hardkv_cpu"}, activation.PLATFORM),
    ],
    ids=["discovered", "allowed", "left out", "by name"],
)
def test_stands_aside_for_another_plugin(
    bare_host: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    environment: dict[str, str],
    expected: str | None,
) -> None:
    install_plugin(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert activation.activate() == expected


# ---- what installing the package changes in SGLang itself, each host simulated in a process of its own

HOSTS = {
    "cpu": ("", {}, "TorchCpuPlatform"),
    "cpu by SGLang's kernels": ("", {"SGLANG_USE_CPU_ENGINE": "1"}, "CpuSRTPlatform"),
    "cuda": (
        "torch.cuda.is_available = lambda: True; torch.cuda.get_device_name = lambda: 'NVIDIA'",
        {},
        "CudaSRTPlatform",
    ),
    # a class of its own in later releases
    "npu": ("torch.npu = types.SimpleNamespace(is_available=lambda: True)", {}, "(NPU)?SRTPlatform"),
    "another plugin": ("", {}, "OtherPlatform"),
}


@pytest.mark.slow
@pytest.mark.parametrize("host", HOSTS)
def test_platform_that_sglang_chooses(tmp_path: Path, host: str) -> None:
    setup, environment, expected = HOSTS[host]
    if host == "another plugin":
        install_plugin(tmp_path)
    # the platform module alone: more of SGLang needs the hardware
    script = (
        f"import sys, types, torch\n{setup}\n"
        "sglang = types.ModuleType('sglang'); sglang.__path__ = [sys.argv[1]]; sys.modules['sglang'] = sglang\n"
        "from sglang.srt.platforms import current_platform\nprint('chosen:', type(current_platform).__name__)\n"
    )
    assert re.search(f"^chosen: {expected}$", run(script, environment, tmp_path), re.MULTILINE)


@pytest.mark.slow
def test_without_the_flag_only_the_list_of_flags_changes(tmp_path: Path) -> None:
    install_plugin(tmp_path)
    changes = run((ROOT / "tests/engine/changed_by_plugin.py").read_text(), {}, tmp_path).splitlines()
    assert "platform: other" in changes
    assert [line for line in changes if line.startswith("changed:")] == [
        "changed: sglang.srt.entrypoints.engine.Engine.server_args_class",
        "changed: sglang.srt.managers.scheduler.Scheduler.__init__",
        "changed: sglang.srt.server_args.ServerArgs.add_cli_args",
        "changed: sglang.srt.server_args.ServerArgs.check_server_args",
        "changed: sglang.srt.server_args.ServerArgs.from_cli_args",
    ]


def run(script: str, environment: dict[str, str], folder: Path) -> str:
    """Output of a Python script that finds the packages of `folder`."""
    sglang = str(Path(sys.modules["sglang"].__file__ or "").parent)
    cleared = {name: value for name, value in os.environ.items() if not name.startswith("SGLANG_")}
    path = {"PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, sglang],
        env={**cleared, **path, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
