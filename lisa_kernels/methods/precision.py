"""Which matrices rest in 8 bits, and which in 4, where some of each do: loss by loss for its bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import nn

from lisa_kernels.errors import InputError
from lisa_kernels.layers import linear_shape
from lisa_kernels.ops.resting import bytes_at_rest as bytes_of
from lisa_kernels.sizes import gb, parse_size

AS_THEY_ARE, MIXED = "16-bit", "mixed"
# Of the blocks at either end of a pretrained SmolLM2, where the matrix with the most inputs loses several times as much
# in 4 bits as others do.
FIRST, LAST, LOSES_MORE = 3, 2, 4.0


class CodeLoss(NamedTuple):
    """What a model loses where a matrix rests in 4 bits, and where it does in 8; in one unit for all of them."""

    nf4: float
    int8: float


def is_size(resting: str) -> bool:
    """Return whether a way to rest is said as a size, such as "5.5GB"."""
    return resting != AS_THEY_ARE and resting[:1].isdigit()


def is_picked(resting: str | None) -> bool:
    """Return whether some matrices of a model that rests so are in 8 bits and others in 4, by what they lose."""
    return resting is not None and (resting == MIXED or is_size(resting))


def bytes_at_rest(layer: nn.Module, kind: str) -> int:
    """Return the bytes of codes and scales of a linear layer's weight."""
    rows, columns = linear_shape(layer)
    return bytes_of(rows * columns, kind)


def least_bytes(layers: Iterable[nn.Module]) -> int:
    """Return the bytes of the matrices of some linear layers where all of them are in 4 bits."""
    return sum(bytes_at_rest(layer, "nf4") for layer in layers)


def pick_kinds(
    layers: Iterable[nn.Module], resting: str, beside_bytes: int, losses: Mapping[nn.Module, CodeLoss]
) -> dict[nn.Module, str]:  # fmt: skip
    """Return "int8" or "nf4" for each layer, so that all of them take no more than a size.

    From all in 4 bits on, those are raised to 8 that save most loss for a byte, as long as there is room. beside_bytes:
    of the output layer. Raises InputError for a size that is too small for 4 bits.
    """
    layers = list(dict.fromkeys(layers))
    least = beside_bytes + least_bytes(layers)
    left = parse_size(resting) - least
    if left < 0:
        raise InputError(
            f"resting={resting!r} is too little: what rests takes {least} bytes ({gb(least)}) with all matrices in 4 "
            "bits; give as much."
        )
    more = {layer: bytes_at_rest(layer, "int8") - bytes_at_rest(layer, "nf4") for layer in layers}
    gained = {layer: losses[layer].nf4 - losses[layer].int8 for layer in layers}
    kinds = dict.fromkeys(layers, "nf4")
    for layer in sorted(layers, key=lambda layer: -gained[layer] / more[layer]):
        if more[layer] <= left:
            kinds[layer] = "int8"
            left -= more[layer]
    return kinds


def losses_by_place(blocks: Mapping[int | None, list[nn.Module]]) -> dict[nn.Module, CodeLoss]:
    """Return what matrices lose as far as is known without their values, for a plan; blocks: layers by their block.

    About the same each, whatever its size, so that small ones are raised first; at both ends of the model the one with
    the most inputs loses more.
    """
    count = len([number for number in blocks if number is not None])
    losses: dict[nn.Module, CodeLoss] = {}
    for number, layers in blocks.items():
        at_an_end = number is not None and (number < FIRST or number >= count - LAST)
        widest = max(linear_shape(layer)[1] for layer in layers)
        for layer in layers:
            more = at_an_end and linear_shape(layer)[1] == widest
            losses[layer] = CodeLoss(LOSES_MORE if more else 1.0, 0.0)
    return losses
