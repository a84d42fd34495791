"""Options of `--kv-compression-config` that do not work with the flags of a start."""

from __future__ import annotations

from typing import Any

from hardkv_sglang.config import HardKVConfig


def refused_options(options: HardKVConfig, server_args: Any) -> list[str]:
    """Messages of every refused option; empty if the server may start.

    server_args: the values in effect, as for `refused_server_flags`.
    """
    if options.survivor_bits < 16 and server_args.device != "cpu":
        return [
            f"survivor_bits={options.survivor_bits} has run on a CPU only so far; leave out survivor_bits, or use "
            "--device cpu"
        ]
    return []
