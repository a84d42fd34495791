"""Entry point of `sglang.srt.plugins`: the argument hooks, and the switch that starts the runtime.

Loaded in every SGLang process that has this package installed. Nothing but the argument surface changes unless a
scheduler is started with `--kv-compression hardkv`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from hardkv_sglang.engine import arguments

SERVER_ARGS = "sglang.srt.server_args.ServerArgs"
SCHEDULER_MODULE = "sglang.srt.managers.scheduler"


def register() -> None:
    """Install the argument hooks; in a scheduler process also the hook that may start the runtime."""
    HookRegistry.register(f"{SERVER_ARGS}.add_cli_args", after_add_cli_args, HookType.AFTER)
    HookRegistry.register(f"{SERVER_ARGS}.from_cli_args", around_from_cli_args, HookType.AROUND)
    HookRegistry.register(f"{SERVER_ARGS}.check_server_args", after_check_server_args, HookType.AFTER)
    if SCHEDULER_MODULE in sys.modules:
        # a scheduler process has this module loaded; the launcher is spared the import
        HookRegistry.register(f"{SCHEDULER_MODULE}.Scheduler.__init__", before_scheduler_init, HookType.BEFORE)
    engine = sys.modules.get("sglang.srt.entrypoints.engine")
    if engine is not None and engine.Engine.server_args_class is not build_server_args:
        engine.Engine.server_args_class = staticmethod(build_server_args)


def after_add_cli_args(_result: None, parser: argparse.ArgumentParser) -> None:
    """add_cli_args(parser): adds our flags."""
    arguments.add_arguments(parser)


def around_from_cli_args(original: Callable[..., Any], cls: type, args: argparse.Namespace) -> Any:
    """from_cli_args(cls, args): keeps our options, which are no ServerArgs fields.

    A namespace that was not made by SGLang's parser lacks them: compression is off.
    """
    mode, source = getattr(args, "kv_compression", "none"), getattr(args, "kv_compression_config", None)
    options = arguments.resolve_options(mode, source)
    if options is not None:
        arguments.seed_defaults(vars(args), torch.cuda.is_available())
    return arguments.attach_options(original(cls, args), options)


def build_server_args(**kwargs: Any) -> Any:
    """Replacement of `Engine.server_args_class`: accepts kv_compression and kv_compression_config."""
    from sglang.srt.server_args import ServerArgs

    mode, source = kwargs.pop("kv_compression", "none"), kwargs.pop("kv_compression_config", None)
    options = arguments.resolve_options(mode, source)
    if options is not None:
        arguments.seed_defaults(kwargs, torch.cuda.is_available())
    return arguments.attach_options(ServerArgs(**kwargs), options)


def after_check_server_args(_result: None, server_args: Any) -> None:
    """check_server_args(self): the launcher's last look at the resolved flags, before anything is loaded."""
    if arguments.attached_options(server_args) is not None:
        arguments.refuse_unsupported(server_args)


def before_scheduler_init(_scheduler: Any, server_args: Any, *_args: Any, **_kwargs: Any) -> None:
    """Scheduler.__init__(self, server_args, ...): SGLang stops the server if this raises."""
    options = arguments.attached_options(server_args)
    if options is None:
        return
    from hardkv_sglang.engine.assembly import Attachment
    from hardkv_sglang.engine.hooks import RUNTIME_HOOKS
    from hardkv_sglang.engine.installation import install

    arguments.refuse_unsupported(server_args)
    install(RUNTIME_HOOKS, Attachment(options))
