"""Sizes in bytes as people write and read them."""

from __future__ import annotations

import re
from fractions import Fraction

from lisa_kernels.errors import InputError

MOST = 2**63
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
          "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}  # fmt: skip
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Return the bytes of "16GB" (1e9 each), "16 GiB" (2^30 each) or "16000000000"; raises InputError for no size."""
    match = _SIZE.fullmatch(text)
    unit = None if match is None else _UNITS.get(match[2].lower())
    # Of a float such as 1.001 a byte would be lost.
    size = Fraction(0) if match is None or unit is None else Fraction(match[1]) * unit
    if not 1 <= size < MOST:
        raise InputError(f"{text!r} is not a size: write 16GB, 16GiB, or a number of bytes such as 16000000000.")
    return int(size)


def gb(size: float) -> str:
    """Return a number of bytes as text in GB (1e9), below one in MB (1e6), below one in kB (1e3)."""
    unit, name = next(((unit, name) for unit, name in ((1e9, "GB"), (1e6, "MB")) if abs(size) >= unit), (1e3, "kB"))
    return f"{size / unit:.{2 if name == 'GB' else 1}f} {name}"
