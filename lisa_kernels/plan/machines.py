"""What cards can do by their makers' data sheets, and how much of it programs get."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from lisa_kernels.errors import InputError, unknown_name
from lisa_kernels.plan.work import Operation

# Shares of a data sheet's rates that training in PyTorch gets: of matrix products, of copies.
FAST, SLOW = (0.90, 0.92), (0.50, 0.70)
# Of a link to the host, that copies from locked memory get; of a disk, that a thread which reads a file gets.
FAST_LINK, SLOW_LINK = 0.85, 0.65
FAST_DISK, SLOW_DISK = 0.90, 0.35
# What a thread reads of a file that the system has in memory, so of any, 1e9 bytes a second: measured on one server.
FILE_GB_S = 4.1
# A kernel's own start and end, and what the host takes to launch one through Python and autograd, in microseconds.
LAUNCH_US, HOST_US = (2.0, 4.0), (4.0, 12.0)
LIMITS = ("matrices", "bandwidth", "launches")
# What bounds a step whose weights come from the host more slowly than they are worked with.
LINK, DISK = "link to the host", "disk"


class Seconds(NamedTuple):
    """A range: what a good day and a bad one take."""

    low: float
    high: float

    def __add__(self, other: object) -> Seconds:  # type: ignore[override]
        assert isinstance(other, Seconds)
        return Seconds(self.low + other.low, self.high + other.high)

    def times(self, factor: float) -> Seconds:
        """Return both ends times a factor."""
        return Seconds(self.low * factor, self.high * factor)


@dataclass(frozen=True)
class Card:
    """Rates of a card: bandwidth in 1e9 bytes a second, dense products summed in float32 in 1e12 operations a second.

    tflops: of 16-bit operands; tflops_fp32: of 32-bit ones, without TF32. memory_gb: as it is sold, 0 where unknown.
    link_gb_s: of its lanes to the host in one direction, where nothing is said those of PCIe 4 × 16.
    """

    name: str
    bandwidth_gb_s: float
    tflops: float
    tflops_fp32: float
    memory_gb: int = 0
    link_gb_s: float = 31.5

    @property
    def is_cpu(self) -> bool:
        """Whether it is a CPU."""
        return False

    def seconds(self, operation: Operation) -> tuple[Seconds, str]:
        """Return what one operation takes on the device, and what bounds it there."""
        rate = (self.tflops if operation.halves else self.tflops_fp32) * 1e12
        ends, middle = [], {}
        for (products, copies), launch in zip((FAST, SLOW), LAUNCH_US):
            takes = {
                "matrices": operation.products / (rate * products),
                "bandwidth": operation.bytes / (self.bandwidth_gb_s * 1e9 * copies), "launches": launch * 1e-6,
            }  # fmt: skip
            ends.append(max(takes.values()))
            middle = takes
        return Seconds(*ends), max(middle, key=lambda name: middle[name])

    def copy_seconds(self, nbytes: float) -> Seconds:
        """Return what so many bytes take from locked host memory, beside the card's work."""
        return link_seconds(nbytes, self.link_gb_s)

    @staticmethod
    def host_seconds(launches: int) -> Seconds:
        """Return what the host takes to launch so many; a device that is faster waits for it."""
        return Seconds(*(launches * each * 1e-6 for each in HOST_US))


CARDS = {
    card.name: card
    for card in (
        Card("a100", 2039, 312, 19.5, 80),
        Card("h100", 3350, 989, 67, 80, 63.0),
        Card("rtx-3060", 360, 25.6, 12.7, 12),
        Card("rtx-3090", 936, 71, 35.6, 24),
        Card("rtx-4060-ti", 288, 44, 22.1, 16, 15.75),
        Card("rtx-4090", 1008, 165, 82.6, 24),
        Card("rtx-5090", 1792, 210, 104.8, 32, 63.0),
        Card("l4", 300, 121, 30.3, 24),
        Card("t4", 320, 65, 8.1, 16, 15.75),
    )
}
# What links to the host carry in one direction, 1e9 bytes a second, by their standards and of 16 lanes.
HOST_LINKS = {"PCIe 3": 15.75, "PCIe 4": 31.5, "PCIe 5": 63.0}
# What solid-state disks read, 1e9 bytes a second, by the data sheets of usual ones.
DISKS = {"NVMe (PCIe 4)": 7.0, "NVMe (PCIe 3)": 3.5, "SATA": 0.55}
# Float32 products of an unknown card, as a share of its 16-bit ones.
FP32_SHARE = 0.5


def link_seconds(nbytes: float, bandwidth_gb_s: float) -> Seconds:
    """Return what so many bytes take from locked host memory over such a link."""
    return Seconds(*(nbytes / (bandwidth_gb_s * 1e9 * share) for share in (FAST_LINK, SLOW_LINK)))


def disk_seconds(nbytes: float, bandwidth_gb_s: float) -> Seconds:
    """Return what so many bytes of a file take from such a disk, where nothing of it is in the system's file cache."""
    return Seconds(*(nbytes / 1e9 / min(bandwidth_gb_s * share, FILE_GB_S) for share in (FAST_DISK, SLOW_DISK)))


def card_by_name(name: str | None, bandwidth_gb_s: float | None = None, tflops: float | None = None) -> Card:
    """Return a known card, or one that is described by its two rates; rates given replace those of a known one.

    Raises InputError for an unknown name and rates that are none, and says how others are given.
    """
    for flag, value in (("--bandwidth", bandwidth_gb_s), ("--tflops", tflops)):
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"{flag} is {value!r}; a number above 0 is wanted, 1e9 bytes or 1e12 operations a second.")
    if name is None:
        if bandwidth_gb_s is None or tflops is None:
            raise InputError("a card that is not named needs both --bandwidth (GB/s) and --tflops; give the other too.")
        return Card("the card given", bandwidth_gb_s, tflops, tflops * FP32_SHARE)
    key = name.lower().replace("_", "-").replace(" ", "-")
    if key not in CARDS:
        error = unknown_name("card", name, [*CARDS, "cpu"])
        raise InputError(f"{error} Any other is described by --bandwidth (GB/s) and --tflops (16-bit, dense).")
    known = CARDS[key]
    return replace(
        known, bandwidth_gb_s=bandwidth_gb_s or known.bandwidth_gb_s, tflops=tflops or known.tflops,
        tflops_fp32=known.tflops_fp32 if tflops is None else tflops * FP32_SHARE,
    )  # fmt: skip
