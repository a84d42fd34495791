"""Installs a table of hooks into SGLang, all or nothing, and verifies it.

SGLang logs and ignores the errors of its plugins; these functions raise instead.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pkgutil import resolve_name
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookSource, HookType

from hardkv_sglang.engine.assembly import Attachment
from hardkv_sglang.engine.reviewed_sources import NEWEST, OLDEST, installed_release, is_reviewed, unreviewed

logger = logging.getLogger(__name__)

SOURCE = HookSource("hardkv", "hardkv-sglang")


class HookError(RuntimeError):
    """A hook is missing or shadowed: serving would silently run dense or corrupt KV."""


@dataclass(frozen=True)
class Hook:
    """One patched host function."""

    target: str
    kind: HookType
    function: Callable[..., Any]
    why: str
    later_name: str | None = None  # where newer releases have the target

    def as_installed(self) -> Hook:
        """The hook on the name that the installed SGLang has."""
        if self.later_name is None or not _exists(self.later_name):
            return self
        return replace(self, target=self.later_name, later_name=None)


def install(hooks: tuple[Hook, ...], hardkv: Attachment) -> None:
    """Bind the hooks to an attachment, patch SGLang and verify every target.

    Raises `HookError` if a target does not exist, was patched before, is not the function that was reviewed, or does
    not end up calling our function.
    """
    hooks = tuple(hook.as_installed() for hook in hooks)
    missing = [hook.target for hook in hooks if not _exists(hook.target)]
    if missing:
        raise HookError(
            f"sglang {installed_release()} has no {', '.join(missing)}; HARD-KV serves sglang {OLDEST} to {NEWEST}"
        )
    taken = [hook.target for hook in hooks if hook.target in HookRegistry._patched]
    if taken:
        raise HookError(f"another plugin already patched {', '.join(taken)}; disable it with SGLANG_PLUGINS=hardkv")
    check_sources([hook.target for hook in hooks])
    bound = [(hook.target, partial(hook.function, hardkv), hook.kind) for hook in hooks]
    for target, function, kind in bound:
        HookRegistry.register(target, function, kind, source=SOURCE)
    HookRegistry.apply_hooks()
    shadowed = [target for target, function, _ in bound if not is_called(target, function)]
    if shadowed:
        raise HookError(f"hooks were not applied or are shadowed: {', '.join(shadowed)}; see the log above")


def check_sources(targets: list[str]) -> None:
    """Compare the host functions with those that were reviewed.

    Raises `HookError` for a difference in a reviewed release. Of another release a warning is logged, which names what
    differs from the last reviewed one.
    """
    release = installed_release()
    changed = unreviewed(targets, release)
    names = ", ".join(changed)
    if not is_reviewed(release):
        logger.warning(
            "HARD-KV: sglang %s was not reviewed; %s to %s were. %s. Serve with one of those, or read the contracts in "
            "docs/design.md against this one and add it to engine/reviewed_hashes.py",
            release, OLDEST, NEWEST, f"Of the functions that it hooks into, {names} differ" if changed else
            "The functions that it hooks into are the same, which says nothing about the others",
        )  # fmt: skip
    elif changed:
        raise HookError(
            f"the installed sglang {release} is not the reviewed one: {names} changed. Install sglang=={release} "
            "again, without patches and without plugins that replace these functions"
        )


def is_called(target: str, function: Callable[..., Any]) -> bool:
    """Whether the host function `target` reaches `function` through its chain of wrappers."""
    wrapper = resolve_name(target)
    while wrapper is not None:
        cells = getattr(wrapper, "__closure__", None) or ()
        if any(cell.cell_contents is function for cell in cells):
            return True
        wrapper = getattr(wrapper, "__wrapped__", None)
    return False


def _exists(target: str) -> bool:
    try:
        resolve_name(target)
    except (ImportError, AttributeError):
        return False
    return True
