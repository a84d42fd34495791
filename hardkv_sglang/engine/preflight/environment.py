"""Packages, plugins and devices of this environment."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, entry_points, requires, version

import psutil
import torch
from packaging.requirements import Requirement
from packaging.version import Version

from hardkv_sglang.engine.preflight import OK, REFUSED, WARN, Finding
from hardkv_sglang.engine.reviewed_sources import OLDEST

DISTRIBUTION = "hardkv-sglang"
PLUGIN = "hardkv"
PLUGIN_GROUP = "sglang.srt.plugins"


def inspect_environment() -> list[Finding]:
    """Findings about what is installed, and about the device."""
    return [*inspect_packages(), inspect_plugin(), *inspect_device(torch.cuda.is_available())]


def inspect_packages() -> list[Finding]:
    """Installed versions against those that this package asks for."""
    try:
        wanted = [Requirement(text) for text in requires(DISTRIBUTION) or []]
    except PackageNotFoundError:
        return [Finding(REFUSED, "packages", "hardkv-sglang is on the path but not installed", "pip install .")]
    return [inspect_package(want) for want in wanted if want.marker is None]


def inspect_package(want: Requirement) -> Finding:
    """One installed version. A newer SGLang starts with a warning; an older one lacks what we hook into."""
    try:
        found = version(want.name)
    except PackageNotFoundError:
        return Finding(REFUSED, want.name, "not installed", f"pip install '{want}'")
    if want.specifier.contains(found, prereleases=True):
        return Finding(OK, want.name, found)
    bad = REFUSED if want.name == "sglang" and Version(found) < Version(OLDEST) else WARN
    return Finding(bad, want.name, f"{found}, wanted {want.specifier}", f"pip install '{want}'")


def inspect_plugin() -> Finding:
    """Whether SGLang will load us: it finds plugins by their entry points, and a variable may leave some out."""
    allowed = [name.strip() for name in os.environ.get("SGLANG_PLUGINS", "").split(",") if name.strip()]
    if PLUGIN not in {point.name for point in entry_points(group=PLUGIN_GROUP)}:
        return Finding(REFUSED, "plugin", f"no entry point of {PLUGIN_GROUP} names {PLUGIN}", "pip install .")
    if allowed and PLUGIN not in allowed:
        text = f"SGLANG_PLUGINS={','.join(allowed)} leaves {PLUGIN} out"
        return Finding(REFUSED, "plugin", text, f"add {PLUGIN} to SGLANG_PLUGINS")
    return Finding(OK, "plugin", f"SGLang loads {PLUGIN}")


def inspect_device(has_cuda: bool) -> list[Finding]:
    """The device that a server takes by itself, and the kernels that decode on it."""
    if not has_cuda:
        memory = psutil.virtual_memory()
        text = f"CPU, {os.cpu_count()} cores, {memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free"
        return [Finding(WARN, "device", text, "use an NVIDIA GPU for anything but trying it out")]
    findings = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        text = f"cuda:{index} {torch.cuda.get_device_name(index)}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free"
        findings.append(Finding(OK, "device", text))
    return [*findings, *(inspect_kernels(name) for name in ("triton", "flashinfer-python"))]


def inspect_kernels(name: str) -> Finding:
    """A package that decode on a GPU runs through."""
    try:
        return Finding(OK, name, version(name))
    except PackageNotFoundError:
        return Finding(REFUSED, name, "not installed, and decode on a GPU needs it", f"pip install {name}")
