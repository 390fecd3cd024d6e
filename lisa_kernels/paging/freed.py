"""Freed host memory that the C library keeps for what comes next, given back to the system."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any


def give_back_freed_memory() -> None:
    """Have the C library keep no pages of memory that is free; of libraries that keep few, nothing is asked.

    glibc takes up to 32 MB at a time from a heap of its own, where one small piece that stays splits what is free
    around it: codes made a matrix at a time would leave half their bytes behind, and grow the process with its model.
    A call takes some 2 ms.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Any:
    if sys.platform != "linux":
        return None
    # musl has none.
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
