"""Linear layers are told by their forward: what does anything else, or may, is no linear layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import DECODERS, gpt2, llama, llama4, phimoe
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from lisa_kernels.errors import InputError
from lisa_kernels.layers import LowRankLinear, PlainLinears, find_linears, is_linear, linear_shape


class Named(nn.Linear):
    """A subclass in name only."""


class Scaled(nn.Linear):
    """A subclass that returns something else than its product."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Deeper(Scaled):
    """Its forward is its parent's, which is not nn.Linear's."""


class NoBias(nn.Linear):
    """A subclass that has its bias elsewhere."""

    def __init__(self) -> None:
        super().__init__(16, 16)
        del self.bias
        self.shift = nn.Parameter(torch.zeros(16))

    @property
    def bias(self) -> Tensor:  # type: ignore[override]
        return self.shift


def replaced() -> nn.Module:
    layer = nn.Linear(16, 16)
    layer.forward = lambda x: x  # type: ignore[method-assign,assignment]
    return layer


class Shaped(nn.Module):
    """Has the attributes of a Conv1D and multiplies in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.nf = 16
        self.weight = nn.Parameter(torch.zeros(16, 16))
        self.bias = nn.Parameter(torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        return (x * 2) @ self.weight


def conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(24, 16)


def dequantised() -> nn.Module:
    return torch.ao.nn.qat.Linear(16, 16, qconfig=torch.ao.quantization.get_default_qat_qconfig("fbgemm"))


UNDERSTOOD = {"linear": lambda: nn.Linear(16, 16), "named": lambda: Named(16, 16), "conv1d": conv1d}
FOREIGN = {
    "own forward": lambda: Scaled(16, 16),
    "inherited forward": lambda: Deeper(16, 16),
    "forward on the instance": replaced,
    "bias elsewhere": NoBias,
    "shape of a Conv1D": Shaped,
    "fake-quantised": dequantised,
    "weight norm by hook": lambda: torch.nn.utils.weight_norm(nn.Linear(16, 16)),
    "spectral norm by hook": lambda: torch.nn.utils.spectral_norm(nn.Linear(16, 16)),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(16, 16)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(16, 16)),
    "pruned": lambda: prune.l1_unstructured(nn.Linear(16, 16), "weight", amount=0.5),
    "pruned bias": lambda: prune.l1_unstructured(nn.Linear(16, 16), "bias", amount=0.5),
    "bilinear": lambda: nn.Bilinear(16, 16, 16),
    "embedding": lambda: nn.Embedding(16, 16),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*UNDERSTOOD, *FOREIGN])
def test_a_linear_layer_is_one_whose_forward_is_linears_own(name: str) -> None:
    make: Any = {**UNDERSTOOD, **FOREIGN}[name]
    assert is_linear(make()) is (name in UNDERSTOOD)


def test_shapes_are_outputs_by_inputs() -> None:
    """Of a weight stored [in, out] too, and of what stands in its place."""
    assert linear_shape(nn.Linear(16, 24)) == linear_shape(conv1d()) == (24, 16)
    assert linear_shape(LowRankLinear(conv1d(), 4)) == (24, 16)


@pytest.mark.parametrize("make", [llama, gpt2, phimoe, llama4], ids=lambda make: make.__name__)
def test_routers_are_no_places_for_slots(make: Any) -> None:
    """All linears of a block but its router; none in Falcon, whose class multiplies in its own way."""
    model = make()
    paths = {place.path for place in find_linears({"": model}, 4)}
    wanted = {path for path, module in model.named_modules() if isinstance(module, nn.Linear) or hasattr(module, "nf")}
    assert wanted - paths == {path for path in wanted if path.endswith("router")}
    assert not find_linears({"": DECODERS["falcon"].make().transformer}, 4)


def test_a_projection_that_is_never_called_is_no_place() -> None:
    """nn.MultiheadAttention multiplies by its projection's weight itself."""
    net = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2), "after": nn.Linear(16, 16)})
    assert [place.path for place in find_linears({"": net}, 4)] == ["after"]


def test_a_rank_that_is_too_large_is_refused_by_the_matrix() -> None:
    """The message names the matrix, its shape and the largest rank."""
    net = nn.ModuleDict({"wide": nn.Linear(20, 20), "small": nn.Linear(10, 9)})
    with pytest.raises(InputError, match=r"net\.small \[9, 10\].*at most 9"):
        find_linears({"net": net}, 10)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FOREIGN)
def test_products_of_other_layers_stay_their_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On CPUs that get products of ours, nothing is put on a layer that is not understood."""
    monkeypatch.setattr("lisa_kernels.layers.plain_linears.has_matrix_units", lambda dtype: False)
    make: Any = FOREIGN[name]
    layer = make()
    before = vars(layer).get("forward")
    linears = PlainLinears(layer)
    assert vars(layer).get("forward") is before
    linears.remove()
    assert vars(layer).get("forward") is before
