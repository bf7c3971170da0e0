"""Compile inner loops with numba, where it is installed (the extra ``fast``)."""

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

MEMORY = 130 << 20
"""Bytes that numba, its compiler and a loop take."""


def compiler_memory() -> int:
    """Return the bytes of memory that the first loop will take of this process."""
    missing = "numba" not in sys.modules and importlib.util.find_spec("numba") is not None
    return MEMORY if missing else 0


@functools.cache
def compile_loop(
    function: Callable[..., Any],
    fastmath: frozenset[str] = frozenset(),
    calls: tuple[Callable[..., Any], ...] = (),
) -> Callable[..., Any] | None:
    """Return a function compiled, without the interpreter's lock; None where numba is missing.

    The machine code is kept beside the source, or in the user's cache, for the next process;
    where neither can be written it is made anew in each. `fastmath` are LLVM's names of what
    floating point may not keep; by default sums keep their order and products are not fused.
    `calls` are the functions of ours that the loop calls, compiled with it; a change of one alone
    does not outdate the code that is kept.
    """
    try:
        numba = importlib.import_module("numba")
    except ModuleNotFoundError:
        return None
    for inner in calls:
        numba.extending.register_jitable(inner)
    options: dict[str, Any] = {"nogil": True, "fastmath": set(fastmath) or False}
    try:
        compiled: Callable[..., Any] = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no folder for the cache
        compiled = numba.njit(**options)(function)
    return compiled
