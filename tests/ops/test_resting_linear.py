"""A linear layer whose weight rests is the layer of what its codes mean, and keeps nothing of that weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lisa_kernels.ops import resting
from lisa_kernels.ops.lowrank_linear import capture_linear, linear, lowrank_linear
from lisa_kernels.ops.resting import KINDS, dequantize_resting_, quantize_resting
from lisa_kernels.ops.resting_linear import capture_resting_linear, resting_linear

M, N, RANK, TOKENS = 96, 128, 8, 20
OF_KIND = pytest.mark.parametrize("kind", KINDS)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


class Layer:
    """The tensors of a layer, and the weight that its codes mean."""

    def __init__(self, kind: str, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(3)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device)

        self.kind = kind
        self.codes, self.scales = quantize_resting(normal(M, N).to(dtype), kind)
        self.weight = dequantize_resting_(torch.empty(M, N, dtype=dtype, device=device), self.codes, self.scales, kind)
        self.x = normal(2, TOKENS // 2, N).to(dtype).requires_grad_()
        self.bias = normal(M).to(dtype).requires_grad_()
        self.slot = normal(RANK, M).requires_grad_()
        self.basis = torch.linalg.qr(normal(N, RANK))[0].t().contiguous().to(dtype)
        self.dy = normal(2, TOKENS // 2, M).to(dtype)

    @property
    def resting(self) -> tuple[Any, ...]:
        return self.codes, self.scales, self.kind, M, self.bias

    def gradients(self, y: Tensor, *others: Tensor) -> list[Tensor]:
        return [y.detach(), *torch.autograd.grad(y, [self.x, self.bias, *others], self.dy.view(y.shape))]


def assert_equal(ours: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(ours, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@DTYPES
@OF_KIND
def test_a_frozen_layer_gives_the_bits_of_its_woken_weight(kind: str, dtype: torch.dtype, device: torch.device) -> None:
    layer = Layer(kind, dtype, device)
    ours = layer.gradients(resting_linear(layer.x, *layer.resting))
    assert_equal(ours, layer.gradients(linear(layer.x, layer.weight, layer.bias)))


@DTYPES
@OF_KIND
def test_a_layer_with_a_slot_gives_the_bits_of_its_woken_weight(
    kind: str, dtype: torch.dtype, device: torch.device
) -> None:
    layer = Layer(kind, dtype, device)
    plain = lowrank_linear(layer.x, layer.weight, layer.bias, layer.slot, layer.basis, 0.5)
    ours = resting_linear(layer.x, *layer.resting, layer.slot, layer.basis, 0.5)
    assert_equal(layer.gradients(ours, layer.slot), layer.gradients(plain, layer.slot))


@DTYPES
@OF_KIND
def test_a_basis_that_trains_gets_the_bits_that_it_gets_beside_the_woken_weight(
    kind: str, dtype: torch.dtype, device: torch.device
) -> None:
    """Where x needs a gradient and where it does not, as in a first layer."""
    layer = Layer(kind, dtype, device)
    basis = layer.basis.to(torch.float32).requires_grad_()
    for x in (layer.x, layer.x.detach()):
        wanted = [tensor for tensor in (x, layer.slot, basis) if tensor.requires_grad]
        gradients = [
            torch.autograd.grad(y, wanted, layer.dy)
            for y in (
                resting_linear(x, *layer.resting, layer.slot, basis, 0.5),
                lowrank_linear(x, layer.weight, layer.bias, layer.slot, basis, 0.5),
            )
        ]
        assert_equal(list(gradients[0]), list(gradients[1]))
        assert gradients[0][-1].shape == basis.shape


@OF_KIND
def test_a_basis_is_found_as_beside_the_woken_weight(kind: str, device: torch.device) -> None:
    layer = Layer(kind, torch.float32, device)
    layer.slot.data.zero_()
    asked: list[tuple[Tensor, ...]] = []

    def choose(dy: Tensor, x: Tensor) -> Tensor:
        asked.append((dy, x))
        return layer.basis

    rows = layer.x.view(-1, N)
    ours = layer.gradients(capture_resting_linear(rows, *layer.resting, layer.slot, choose), layer.slot)
    plain = layer.gradients(capture_linear(rows, layer.weight, layer.bias, layer.slot, choose), layer.slot)
    assert_equal(ours, plain)
    assert len(asked) == 2
    assert_equal(list(asked[0]), list(asked[1]))


@OF_KIND
def test_a_weight_of_several_tiles_is_one_weight(
    kind: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the order in which dX is summed; no more than a tile of it is woken at a time."""
    layer = Layer(kind, torch.bfloat16, device)
    whole = layer.gradients(resting_linear(layer.x, *layer.resting, layer.slot, layer.basis), layer.slot)
    woken: list[int] = []

    def decode(out: Tensor, *parts: Any) -> Tensor:
        woken.append(out.numel())
        return dequantize_resting_(out, *parts)

    monkeypatch.setattr(resting, "TILE_ELEMENTS", 64 * N)
    monkeypatch.setattr(resting, "dequantize_resting_", decode)
    tiles = layer.gradients(resting_linear(layer.x, *layer.resting, layer.slot, layer.basis), layer.slot)
    for one, other in zip(tiles, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=2**-7, atol=2**-7 * float(other.abs().max()))
    assert woken == [64 * N, 32 * N] * 2


@OF_KIND
def test_nothing_is_kept_but_codes_and_the_projected_input(kind: str) -> None:
    layer = Layer(kind, torch.float32, torch.device("cpu"))
    own = {tensor.data_ptr() for tensor in (layer.codes, layer.scales, layer.slot, layer.basis)}
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = resting_linear(layer.x, *layer.resting, layer.slot, layer.basis)
        assert [tensor.numel() for tensor in kept] == [TOKENS * RANK]
        y.backward(layer.dy)
        # Its gradient takes the input too.
        kept.clear()
        y = resting_linear(layer.x, *layer.resting, layer.slot, layer.basis.requires_grad_())
        assert sorted(tensor.numel() for tensor in kept) == [TOKENS * RANK, TOKENS * N]


def test_autocast_makes_the_products_sixteen_bit() -> None:
    layer = Layer("nf4", torch.float32, torch.device("cpu"))
    with torch.autocast("cpu", torch.bfloat16):
        y = resting_linear(layer.x, *layer.resting, layer.slot, layer.basis)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert layer.x.grad is not None
    assert (layer.x.grad.dtype, layer.slot.grad.dtype) == (torch.float32, torch.float32)  # type: ignore[union-attr]


@OF_KIND
def test_the_operations_pass_torchs_own_checks(kind: str) -> None:
    layer = Layer(kind, torch.float32, torch.device("cpu"))
    for slot, basis in ((None, None), (layer.slot, layer.basis), (layer.slot, layer.basis.clone().requires_grad_())):
        arguments = (layer.x, *layer.resting, slot, basis, 1.0)
        torch.library.opcheck(torch.ops.lisa_kernels.resting_linear, arguments)


@OF_KIND
def test_a_compiled_layer_is_one_graph(kind: str) -> None:
    layer = Layer(kind, torch.float32, torch.device("cpu"))

    def forward(x: Tensor) -> Tensor:
        return resting_linear(x, *layer.resting, layer.slot, layer.basis)

    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    assert_equal(
        layer.gradients(compiled(layer.x), layer.slot),
        layer.gradients(forward(layer.x), layer.slot),
    )
