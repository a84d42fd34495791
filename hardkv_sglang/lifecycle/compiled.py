"""Loops that run as machine code, where numpy would need a pass over memory for each operation of them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import numba

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """The function, compiled at its first call: seconds, unless an earlier process has left the code
    beside the source or in the user's cache.

    Floating-point operations are those of numpy, in the order in which they are written. What the function calls and
    the constants that it reads have to be in its own file, because a change elsewhere does not make its code stale.
    """
    dispatcher = numba.njit(error_model="numpy")(function)
    with suppress(RuntimeError):  # neither place can be written: every process compiles
        dispatcher.enable_caching()
    return dispatcher
