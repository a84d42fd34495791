"""The hook table against the real SGLang: complete, inert when off, all or nothing, loud.

Each case runs in a process of its own, because patches last as long as a process.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

PREAMBLE = """
from pkgutil import resolve_name
from types import SimpleNamespace
import sglang.srt.managers.scheduler
from sglang.srt.plugins import load_plugins
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from hardkv_sglang.engine import arguments
from hardkv_sglang.engine import installation
from hardkv_sglang.config import HardKVConfig
from hardkv_sglang.engine.hooks import RUNTIME_HOOKS
from hardkv_sglang.engine.installation import Hook, HookError, install, is_called
from hardkv_sglang.engine.reviewed_sources import NEWEST, OLDEST, installed_release
from hardkv_sglang.plugin import before_scheduler_init
from hardkv_sglang.engine.assembly import Attachment

targets = [hook.as_installed().target for hook in RUNTIME_HOOKS]

def snapshot():
    return {target: resolve_name(target) for target in targets}

def expect(error, call, *args):
    try:
        call(*args)
    except error as caught:
        return str(caught)
    raise SystemExit(f"{error.__name__} was not raised")
"""

WITHOUT_AND_WITH_THE_FLAG = """
before = snapshot()
load_plugins()
before_scheduler_init(None, SimpleNamespace())
assert snapshot() == before, "off must mean untouched"
assert not set(targets) & set(HookRegistry._patched)

gone = Hook("sglang.srt.mem_cache.common.no_such_function", HookType.BEFORE, lambda runtime: None, "")
message = expect(HookError, install, (*RUNTIME_HOOKS, gone), Attachment(HardKVConfig()))
assert "no_such_function" in message and f"{OLDEST} to {NEWEST}" in message, message
assert installed_release() in message, message
assert snapshot() == before, "a missing target must leave the others alone"

install(RUNTIME_HOOKS, Attachment(HardKVConfig()))
after = snapshot()
assert all(before[t] is not after[t] for t in before)
# names that other modules imported from the patched one are ours as well
from sglang.srt.managers import schedule_batch
assert schedule_batch.release_kv_cache is after["sglang.srt.mem_cache.common.release_kv_cache"]
"""

OTHER_PLUGINS = """
target = targets[3]
HookRegistry.register(target, lambda *args: None, HookType.BEFORE)
load_plugins()
HookRegistry.apply_hooks()
message = expect(HookError, install, RUNTIME_HOOKS, Attachment(HardKVConfig()))
assert target in message and "SGLANG_PLUGINS" in message, message

HookRegistry.reset()
stock_apply = HookRegistry.apply_hooks.__func__
def apply_then_shadow(cls):
    stock_apply(cls)
    owner, name = target.rsplit(".", 1)
    setattr(resolve_name(owner), name, lambda *args: None)
HookRegistry.apply_hooks = classmethod(apply_then_shadow)
message = expect(HookError, install, RUNTIME_HOOKS, Attachment(HardKVConfig()))
assert target in message and "shadowed" in message, message
"""


CHANGED_SOURCES = """
import functools, logging
from sglang.srt.mem_cache import common
from hardkv_sglang.engine import reviewed_sources
from hardkv_sglang.engine.reviewed_sources import RELEASES, hashes_of, source_hash

release = installed_release()
assert release in RELEASES
assert {target: hashes_of(release)[target] for target in targets} == {t: source_hash(t) for t in targets}

messages = []
class Listener(logging.Handler):
    def emit(self, record):
        messages.append(record.getMessage())
logging.getLogger(installation.__name__).addHandler(Listener())

target, pristine, before = "sglang.srt.mem_cache.common.release_kv_cache", common.release_kv_cache, snapshot()

@functools.wraps(pristine)
def wrapper(*args, **kwargs):
    return pristine(*args, **kwargs)
common.release_kv_cache = wrapper
installation.check_sources(targets)
assert not messages

common.release_kv_cache = lambda *args, **kwargs: pristine(*args, **kwargs)
message = expect(HookError, install, RUNTIME_HOOKS, Attachment(HardKVConfig()))
assert target in message and release in message, message
assert not any(other in message for other in targets if other != target), message
assert not set(targets) & set(HookRegistry._patched), "nothing may be patched by then"

# releases that nobody has read: the next one, an old one, a build from the sources
for unknown in ("0.5.24", "0.5.16", f"{release}.post1", "0.0.0.dev1+g0123456"):
    installation.installed_release = lambda: unknown
    installation.check_sources(targets)
    warning = messages.pop()
    assert target in warning and unknown in warning and f"{OLDEST} to {NEWEST}" in warning, warning
    assert "was not reviewed" in warning and not messages, warning
common.release_kv_cache = pristine
# one whose functions are those of the last reviewed release is not passed over in silence either
installation.installed_release = lambda: f"{release}.post1"
installation.check_sources(targets)
(warning,) = messages
assert "the same" in warning and not any(name in warning for name in targets), warning
assert snapshot() == before

# without its source a function cannot be compared: that is said, too
exec("def release_kv_cache(req, tree_cache, is_insert=True): pass", vars(common))
assert reviewed_sources.unreviewed([target], release) == [target]
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [WITHOUT_AND_WITH_THE_FLAG, OTHER_PLUGINS, CHANGED_SOURCES],
    ids=["flag", "other plugins", "changed sources"],
)
def test_hooks(case: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PREAMBLE + case], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
