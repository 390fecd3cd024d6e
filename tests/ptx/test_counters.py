"""Sectors, widths and bank conflicts of access patterns whose costs are known."""

from __future__ import annotations

import numpy as np
import pytest

from .counters import SharedTraffic, Traffic

LANES = np.arange(64)


@pytest.mark.parametrize(
    ("addresses", "width", "sectors"),
    [(4 * LANES, 4, 8), (16 * LANES, 16, 32), (128 * LANES, 4, 64), (0 * LANES, 4, 2), (32 * LANES, 32, 64)],
    ids=["contiguous", "contiguous 16 bytes", "strided", "one address", "contiguous 32 bytes"],
)
def test_sectors_per_warp(addresses: np.ndarray, width: int, sectors: int) -> None:
    """Two warps touch this many 32-byte sectors, each warp counted by itself."""
    traffic = Traffic()
    traffic.record(addresses, None, width)
    assert (traffic.sectors, traffic.bytes, traffic.widths) == (sectors, 64 * width, {width: 2})
    assert (traffic.requests, traffic.widest) == (2, width)


def test_lanes_that_do_not_take_part_count_nothing() -> None:
    """A warp of which nobody takes part makes no request."""
    traffic = Traffic()
    traffic.record(4 * LANES, LANES < 8, 4)
    assert (traffic.sectors, traffic.bytes, traffic.requests) == (1, 32, 1)


@pytest.mark.parametrize(
    ("addresses", "width", "wavefronts", "ideal"),
    [
        (4 * LANES, 4, 2, 2),
        (8 * LANES, 4, 4, 2),
        (128 * LANES, 4, 64, 2),
        (0 * LANES, 4, 2, 2),
        (16 * LANES, 16, 8, 8),
        (128 * LANES, 16, 64, 8),
    ],
    ids=["contiguous", "every second word", "one bank", "one word", "contiguous 16 bytes", "16 bytes in four banks"],
)
def test_bank_conflicts(addresses: np.ndarray, width: int, wavefronts: int, ideal: int) -> None:
    """Words of one bank come one after the other; the same word comes once; 16-byte accesses go by eight lanes."""
    traffic = SharedTraffic()
    traffic.record(addresses, None, width)
    assert (traffic.wavefronts, traffic.ideal) == (wavefronts, ideal)
