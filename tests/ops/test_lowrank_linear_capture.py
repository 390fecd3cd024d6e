"""The operation by which a compiled model finds bases: as the eager one, asking the layer that its number names."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor

from lisa_kernels.errors import InputError
from lisa_kernels.ops.lowrank_linear import capture_linear, number_of
from lisa_kernels.ops.lowrank_linear.capture import numbered_capture


class Layer:
    """Chooses the first rows of a gradient's right side, and notes that it was asked."""

    def __init__(self) -> None:
        self.asked = 0

    def choose(self, dy: Tensor, x: Tensor) -> Tensor:
        self.asked += 1
        return torch.linalg.qr(x[:3].t()).Q.t().contiguous()


def operands() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return x [6, 8], W [5, 8], b [5], a slot of zeros [3, 5] and dY [6, 5]; all but W and dY want gradients."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, dy = (torch.randn(shape, generator=generator) for shape in ((6, 8), (5, 8), (5,), (6, 5)))
    return x.requires_grad_(), weight, bias.requires_grad_(), torch.zeros(3, 5, requires_grad=True), dy


def test_values_and_gradients_are_those_of_the_eager_layer() -> None:
    """Bit for bit, and each asks its layer once."""
    found = []
    for numbered in (False, True):
        layer, (x, weight, bias, slot, dy) = Layer(), operands()
        if numbered:
            y = numbered_capture(x, weight, bias, slot, number_of(layer.choose))
        else:
            y = capture_linear(x, weight, bias, slot, layer.choose)
        y.backward(dy)
        assert layer.asked == 1
        found.append([y.detach(), x.grad, bias.grad, slot.grad])
    assert all(torch.equal(one, other) for one, other in zip(*found))  # type: ignore[arg-type]


def test_a_frozen_slot_asks_nobody() -> None:
    layer, (x, weight, bias, slot, dy) = Layer(), operands()
    numbered_capture(x, weight, bias, slot.requires_grad_(False), number_of(layer.choose)).backward(dy)
    assert layer.asked == 0
    assert x.grad is not None


def test_layers_of_other_numbers_are_not_asked_and_one_that_is_gone_is_told() -> None:
    first, second = Layer(), Layer()
    x, weight, bias, slot, dy = operands()
    numbers = [number_of(layer.choose) for layer in (first, second)]
    numbered_capture(x, weight, bias, slot, numbers[1]).backward(dy)
    assert (first.asked, second.asked) == (0, 1)
    y = numbered_capture(x, weight, bias, slot, numbers[0])
    del first
    gc.collect()
    with pytest.raises(InputError, match="layer that is gone"):
        y.backward(dy)


def test_shapes_are_known_without_values() -> None:
    """What a compiler traces with has the shapes and dtypes of what runs."""
    layer, (x, weight, bias, slot, _) = Layer(), operands()
    number = number_of(layer.choose)
    torch.library.opcheck(
        numbered_capture, (x, weight, bias, slot, number), test_utils=("test_schema", "test_faketensor")
    )
