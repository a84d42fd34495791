"""Whether SGLang's hooked functions are those that were read when their contracts were written.

`python -m hardkv_sglang.engine.reviewed_sources` prints what the installed release changes, for `reviewed_hashes.py`.
Read that against docs/design.md, "Contracts with SGLang", before you add it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from hashlib import sha256
from importlib.metadata import version
from pkgutil import resolve_name
from textwrap import dedent

from packaging.version import Version

from hardkv_sglang.engine.reviewed_hashes import CHANGES

RELEASES = tuple(CHANGES)
OLDEST, NEWEST = RELEASES[0], RELEASES[-1]
DIGITS = 16


def is_reviewed(release: str) -> bool:
    """Whether the contracts were read against this release."""
    return release in CHANGES


def hashes_of(release: str) -> Mapping[str, str]:
    """By hooked function, the hash of its reviewed source; of an unknown release, those of the one before it."""
    known: dict[str, str] = {}
    for name in RELEASES:
        if Version(name) <= Version(release):
            known.update(CHANGES[name])
    return known or CHANGES[OLDEST]


def source_hash(target: str) -> str:
    """Hash of a host function's source, as it is on disk: wrappers around it, ours or others', are looked through.

    A function without readable source, or a wrapper that hides what it wraps, hashes to something else than reviewed.
    """
    function = inspect.unwrap(resolve_name(target))
    try:
        source = dedent(inspect.getsource(function))
    except (OSError, TypeError):
        return "no source"
    return sha256(source.encode()).hexdigest()[:DIGITS]


def unreviewed(targets: Iterable[str], release: str) -> list[str]:
    """Those of the targets whose source is not that of the release, or of the last reviewed one before it."""
    known = hashes_of(release)
    return [target for target in targets if known.get(target) != source_hash(target)]


def installed_release() -> str:
    """Version of the installed SGLang."""
    return version("sglang")


def print_changes() -> None:
    """Print a block of `reviewed_hashes.CHANGES` for the installed release, against the reviewed one before it."""
    from hardkv_sglang.engine.hooks import RUNTIME_HOOKS

    release = installed_release()
    before = [name for name in RELEASES if Version(name) < Version(release)]
    known = hashes_of(before[-1]) if before else {}
    print(f'    "{release}": {{')
    for target in (hook.as_installed().target for hook in RUNTIME_HOOKS):
        found = source_hash(target)
        if known.get(target) != found:
            print(f'        "{target}":\n            "{found}",')
    print("    },")


if __name__ == "__main__":
    print_changes()
