"""What `hardkv doctor` finds: flags and models in a process of its own, because SGLang's plugins stay loaded in one."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from hardkv_sglang.engine.preflight import OK, REFUSED, WARN, Finding, would_start
from hardkv_sglang.engine.preflight import environment as env
from hardkv_sglang.engine.preflight.memory import PoolShare, judge
from hardkv_sglang.engine.reviewed_sources import RELEASES
from hardkv_sglang.kernels.footprint import Footprint

ROOT = Path(__file__).parents[2]

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
    "num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 2, "vocab_size": 128,
    "max_position_embeddings": 1024, "torch_dtype": "bfloat16",
}  # fmt: skip
GEMMA = {**LLAMA, "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "head_dim": 16}
SLIDING = {**GEMMA, "attn_logit_softcapping": None}
CAPPED = {**GEMMA, "layer_types": ["full_attention"] * 2}
LATENT = {
    **LLAMA, "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "kv_lora_rank": 16,
    "q_lora_rank": None, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
}  # fmt: skip
MODELS = {
    "llama": LLAMA,
    "sliding": SLIDING,
    "capped": CAPPED,
    "latent": LATENT,
    "broken": {**LLAMA, "num_hidden_layers": "two"},
}

SCRIPT = """
import json, sys
from dataclasses import asdict
from hardkv_sglang.engine.preflight.launch import inspect_launch
print(json.dumps({name: [asdict(f) for f in inspect_launch(flags)] for name, flags in json.loads(sys.argv[1]).items()}))
"""
COMMON = ["--device", "cpu", "--max-total-tokens", "512", "--skip-tokenizer-init"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Finding]]:
    """Findings of every case."""
    root = tmp_path_factory.mktemp("models")
    for name, config in MODELS.items():
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(config))
    (root / "priors.json").write_text("{}")
    llama = ["--model-path", str(root / "llama"), *COMMON]
    priors = json.dumps({"priors": str(root / "priors.json")})
    cases = {
        "plain": llama,
        "page size": [*llama, "--page-size", "1"],
        "two flags": [*llama, "--enable-mixed-chunk", "--kv-cache-dtype", "fp8_e5m2"],
        "SGLang refuses": [*llama, "--tp-size", "3", "--nnodes", "2"],
        "typing error": [*llama, "--page-sise", "32"],
        "option": [*llama, "--kv-compression-config", '{"top_p": 2}'],
        "dense": [*llama, "--kv-compression", "none"],
        "priors": [*llama, "--kv-compression-config", priors],
        "no model": ["--model-path", str(root / "nothing"), *COMMON],
        "sliding": ["--model-path", str(root / "sliding"), *COMMON],
        "capped": ["--model-path", str(root / "capped"), *COMMON],
        "broken": ["--model-path", str(root / "broken"), *COMMON],
        "latent": ["--model-path", str(root / "latent"), *COMMON],
    }
    command = [sys.executable, "-c", SCRIPT, json.dumps(cases)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    answer: dict[str, list[dict[str, Any]]] = json.loads(done.stdout.splitlines()[-1])
    return {name: [Finding(**finding) for finding in findings] for name, findings in answer.items()}


@pytest.mark.slow
def test_a_start_that_works(found: dict[str, list[Finding]]) -> None:
    findings = {finding.subject: finding for finding in found["plain"]}
    assert {finding.status for finding in findings.values()} == {OK}
    assert "--page-size 32" in findings["flags"].text
    assert "2 layers, 2 KV heads of 16" in findings["model"].text
    assert findings["memory"].text.startswith("pool of about 512 tokens")
    assert "for 256 requests" in findings["memory"].text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "subject", "text", "remedy"),
    [
        ("page size", "flags", "pages of 16, 32, 64 tokens", "use --page-size 32"),
        ("SGLang refuses", "flags", "divisible by number of nodes", "change that flag"),
        ("typing error", "flags", "--page-sise", "--help"),
        ("option", "flags", "top_p=2 is out of range", "--help"),
        ("priors", "flags", "priors.json: not a file", "change that flag"),
        ("no model", "flags", "nothing", "check --model-path"),
        ("broken", "flags", "num_hidden_layers", "check --model-path"),
        ("sliding", "model", "sliding-window", "remove --kv-compression"),
        ("capped", "model", "capped attention logits", "remove --kv-compression"),
        ("latent", "model", "MLA", "remove --kv-compression"),
    ],
)
def test_what_is_refused(found: dict[str, list[Finding]], case: str, subject: str, text: str, remedy: str) -> None:
    refused = [finding for finding in found[case] if finding.status == REFUSED]
    assert refused, found[case]
    assert refused[0].subject == subject
    assert text in refused[0].text
    assert remedy in refused[0].remedy
    assert not would_start(found[case])


@pytest.mark.slow
def test_every_refused_flag_is_named(found: dict[str, list[Finding]]) -> None:
    texts = [finding.text for finding in found["two flags"] if finding.status == REFUSED]
    assert len(texts) == 2
    assert texts[0].startswith("--kv-cache-dtype")
    assert texts[1].startswith("--enable-mixed-chunk")


@pytest.mark.slow
def test_dense_serving_is_no_refusal(found: dict[str, list[Finding]]) -> None:
    assert [finding.status for finding in found["dense"]] == [WARN]


@pytest.mark.parametrize(
    ("want", "status"),
    [("sglang==0.0.1", WARN), ("torch>=99", WARN), ("hardkv-no-such-package", REFUSED), ("torch>=2", OK)],
)
def test_versions(want: str, status: str) -> None:
    finding = env.inspect_package(Requirement(want))
    assert finding.status == status
    assert (want in finding.remedy) == (status != OK)


@pytest.mark.parametrize(
    ("found", "status"), [("0.5.16", REFUSED), ("0.5.17", OK), ("0.5.23", OK), ("0.5.24", WARN), ("0.6.0rc1", WARN)]
)
def test_releases_of_sglang(monkeypatch: pytest.MonkeyPatch, found: str, status: str) -> None:
    monkeypatch.setattr(env, "version", lambda _name: found)
    finding = env.inspect_package(Requirement("sglang>=0.5.17,<0.5.24"))
    assert finding.status == status
    assert found in finding.text and ("0.5.17" in finding.remedy) == (status != OK)


def test_the_releases_that_may_be_installed_are_those_that_were_reviewed() -> None:
    declared = re.search(r'"(sglang>=.*?)"', (ROOT / "pyproject.toml").read_text())
    assert declared is not None
    allowed = Requirement(declared[1]).specifier
    assert all(allowed.contains(release) for release in RELEASES)
    last = Version(RELEASES[-1])
    assert not allowed.contains(f"{last.major}.{last.minor}.{last.micro + 1}")
    assert not allowed.contains("0.5.16")


def test_packages_are_those_that_are_declared() -> None:
    assert {"sglang", "torch", "transformers"} <= {finding.subject for finding in env.inspect_packages()}


@pytest.mark.parametrize(("plugins", "status"), [(None, OK), ("other, hardkv", OK), ("other", REFUSED)])
def test_plugin_may_be_left_out(monkeypatch: pytest.MonkeyPatch, plugins: str | None, status: str) -> None:
    if plugins is not None:
        monkeypatch.setenv("SGLANG_PLUGINS", plugins)
    assert env.inspect_plugin().status == status


def test_a_cpu_is_for_trying_out() -> None:
    (finding,) = env.inspect_device(has_cuda=False)
    assert finding.status == WARN
    assert finding.text.startswith("CPU")


GB = 10**9
SMALL = Footprint(GB // 100, GB // 100, 0)


@pytest.mark.parametrize(
    ("share", "footprint", "device", "status", "text"),
    [
        (PoolShare(GB, 10000, 32, None), SMALL, "cuda", OK, "pool of about 97984 tokens"),
        (PoolShare(GB, 10000, 32, 50000), SMALL, "cuda", OK, "pool of about 49984 tokens"),
        (PoolShare(GB, 10000, 32, None), Footprint(GB // 2, 0, 0), "cuda", WARN, "a large share"),
        (PoolShare(GB, 10000, 32, None), Footprint(2 * GB, 0, 0), "cuda", REFUSED, "nothing is left for the pool"),
        (PoolShare(GB, 10000, 32, 99968), SMALL, "cuda", REFUSED, "--max-total-tokens 99968 does not fit"),
        (PoolShare(GB, 10000, 32, 99968), SMALL, "cpu", OK, "pool of about 99968 tokens"),
        (PoolShare(-GB, 10000, 32, None), SMALL, "cuda", REFUSED, "nothing is left for the pool"),
    ],
)
def test_pool_and_tables_together(share: PoolShare, footprint: Footprint, device: str, status: str, text: str) -> None:
    finding = judge(share, footprint, 16, device)
    assert finding.status == status
    assert text in finding.text
    assert "for 16 requests" in finding.text
    assert ("--max-running-requests" in finding.remedy) == (status != OK)


def test_a_refusal_is_taken_apart() -> None:
    finding = Finding.refused("flags", "--x: why; and why; remove --x")
    assert (finding.text, finding.remedy) == ("--x: why; and why", "remove --x")
