"""Sizes of GPU memory: those of the cards that are sold, and those that a user writes."""

from __future__ import annotations

import math
import re

from lisa_kernels.errors import InputError

GIB = 2**30
# What is on the card and no plan sees: CUDA's context, cuBLAS without its workspaces, loaded kernels and the buffers
# inside of them. An allowance, not a measurement: people report 0.3 to 0.6 GB from Ampere on.
CONTEXT_BYTES = 600_000_000
CARDS_GB = (8, 10, 12, 16, 24, 32, 48, 80)
# A card sold as 24 GB has 24 GiB, of which driver and firmware keep 1 to 3 %: torch's messages speak of 7.8 GiB in all
# where 8 were sold, 23.7 of 24, 79.2 of 80. Error correction takes 6 % more of the GDDR cards that have it on.
KEPT_BY_DRIVER = 0.03
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
          "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}  # fmt: skip
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def card_bytes(card_gb: int) -> int:
    """Return the bytes that programs see of a card sold as `card_gb` GB."""
    return int(card_gb * GIB * (1 - KEPT_BY_DRIVER))


def parse_size(text: str) -> int:
    """Return the bytes of "16GB" (1e9 each), "16 GiB" (2^30 each) or "16000000000"; raises InputError for no size."""
    match = _SIZE.fullmatch(text)
    unit = None if match is None else _UNITS.get(match[2].lower())
    size = 0 if match is None or unit is None else float(match[1]) * unit
    if not 1 <= size < math.inf:
        raise InputError(f"{text!r} is not a size: write 16GB, 16GiB, or a number of bytes such as 16000000000.")
    return int(size)


def gb(size: float) -> str:
    """Return a number of bytes as text in GB (1e9), below one in MB (1e6), below one in kB (1e3)."""
    unit, name = next(((unit, name) for unit, name in ((1e9, "GB"), (1e6, "MB")) if abs(size) >= unit), (1e3, "kB"))
    return f"{size / unit:.{2 if name == 'GB' else 1}f} {name}"
