"""Where a resting weight lives, behind one small interface: beside the work on the device, or elsewhere.

`methods.streaming` has those in host memory and in a file.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Protocol

from lisa_kernels.ops.resting import RestingWeight

if TYPE_CHECKING:
    from lisa_kernels.layers.resting import RestingLinear


class CodesHome(Protocol):
    """Where the codes and scales of a layer's weight are between uses."""

    @property
    def stays(self) -> bool:
        """Whether what is lent is there between uses too: a backward may then keep it."""

    def lend(self, layer: RestingLinear) -> AbstractContextManager[RestingWeight]:
        """Lend the weight where the layer computes, to what is queued there inside."""

    def put(self, layer: RestingLinear, weight: RestingWeight, first: int) -> None:
        """Take other codes for some rows, of which `first` is the first, or for all; they are where the layer computes.

        The codes are read by what is queued there, and may be given up at once.
        """


class OnDevice:
    """At home where the layer computes: buffers of the layer, which move with the model."""

    stays = True

    @contextmanager
    def lend(self, layer: RestingLinear) -> Iterator[RestingWeight]:
        """Lend what is there."""
        yield layer.resting

    def put(self, layer: RestingLinear, weight: RestingWeight, first: int) -> None:
        """Take codes for some rows, in the place of what is there, or for all."""
        if not layer.codes.numel():
            layer.codes, layer.scales = weight.codes, weight.scales
            return
        rows = layer.resting.rows(slice(first, first + weight.m))
        rows.codes.copy_(weight.codes)
        rows.scales.copy_(weight.scales)
