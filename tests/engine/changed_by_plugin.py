"""Prints every name of SGLang that this package changes, on a host with a platform plugin of its own.

Run by test_platform.py in a process of its own.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from typing import Any

from sglang.srt.platforms import current_platform
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import ServerArgs


def names() -> dict[str, Any]:
    """Every attribute of SGLang's modules and of the classes in them."""
    found: dict[str, Any] = {}
    for module_name, module in list(sys.modules.items()):
        if module_name.partition(".")[0] != "sglang" or module is None:
            continue
        for name, value in list(vars(module).items()):
            found[f"{module_name}.{name}"] = value
            if isinstance(value, type) and value.__module__ == module_name:
                found.update({f"{module_name}.{name}.{key}": member for key, member in vars(value).items()})
    return found


for loaded in ("sglang.srt.entrypoints.engine", "sglang.srt.managers.scheduler"):
    import_module(loaded)
before = names()
load_plugins()
parser = argparse.ArgumentParser()
ServerArgs.add_cli_args(parser)
after = names()
print("platform:", current_platform.device_name)
for name in sorted(before):
    is_ours = str(getattr(before[name], "__module__", "")).startswith("hardkv_sglang")
    # the plugin loader keeps records of its own
    if (is_ours or before[name] is not after.get(name)) and not name.startswith("sglang.srt.plugins."):
        print("changed:", name)
