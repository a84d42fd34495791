"""What HARD-KV does not support, as two tables: server flags (launcher) and model kinds (scheduler).

Nothing runs silently dense or silently wrong: each row stops the server with a message that names the flag
as it is typed and what to do instead. These files read attributes of the objects they are given and import no
SGLang.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Predicate = Callable[[Any], bool]


@dataclass(frozen=True)
class Refusal:
    """One unsupported setting: refused where `predicate` holds for the object under check."""

    name: str  # field of ServerArgs, environment variable, or model kind
    predicate: Predicate
    message: str  # what was met, why it is refused, the remedy
