"""Layers that are not understood (routers, subclasses, weights made by hooks) are left as they are by every method."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from families import DECODERS, anatomy, changed, gpt2, llama, llama4, logits, phimoe, snapshot, tokens, train
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from lisa_kernels import LISA, OWS, BAdam, FullFineTune, GaLore, InputError, LoRAFA, OwLore, attach
from lisa_kernels.layers import LowRankLinear
from lisa_kernels.methods import Method

METHODS: dict[str, Method] = {
    "lisa": LISA(active_layers=2),
    "ows": OWS(active_layers=2, scores="outlier"),
    "owlore": OwLore(active_layers=2, rank=4, scores="uniform"),
    "badam": BAdam(active_layers=2),
    "galore": GaLore(rank=4),
    "lora-fa": LoRAFA(rank=4),
    "full": FullFineTune(),
}


class Doubled(nn.Linear):
    """A user's own layer: twice what a linear layer returns."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def with_layer(layer: nn.Module) -> Any:
    """Return a Llama of two blocks with a layer of the user's own in the second."""
    model = llama(layers=2)
    model.model.layers[1].mlp.gate_proj = layer
    return model


MODELS = {
    "phimoe": lambda: phimoe(),
    "llama4": lambda: llama4(),
    "mixtral": DECODERS["mixtral"].make,
    "falcon": DECODERS["falcon"].make,
    "gpt2": gpt2,
    "doubled": lambda: with_layer(Doubled(32, 48, bias=False)),
    "weight norm": lambda: with_layer(parametrizations.weight_norm(nn.Linear(32, 48, bias=False))),
    "weight norm by hook": lambda: with_layer(torch.nn.utils.weight_norm(nn.Linear(32, 48, bias=False))),
}


# Every method for the routers of transformers and a user's layer; the rest where a slot could have been put.
PAIRS = [(name, method) for name in ("phimoe", "llama4", "doubled") for method in METHODS] + [
    (name, method) for name in MODELS for method in ("lisa", "owlore") if name not in ("phimoe", "llama4", "doubled")
]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:every outlier score")
@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_a_model_computes_the_same_and_trains(name: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attached in evaluation it gives its own logits, on CPUs with products of ours too; then it learns; detached it
    has the modules it had.
    """
    monkeypatch.setattr("lisa_kernels.layers.plain_linears.has_matrix_units", lambda dtype: False)
    model: Any = MODELS[name]()
    shape, plain, before = anatomy(model), logits(model), snapshot(model)
    optimizer = attach(model, METHODS[method], lr=5e-3, calibration=[tokens()])
    torch.testing.assert_close(logits(model), plain, rtol=1e-5, atol=1e-6)
    losses = [train(model, optimizer, tokens()) for _ in range(4)]
    assert losses[-1] < losses[0]
    optimizer.detach()
    assert anatomy(model) == shape
    assert changed(model, before)


def test_a_model_without_a_place_for_adapters_is_refused() -> None:
    """Every layer of a Falcon multiplies in its own way."""
    with pytest.raises(InputError, match="no linear layer that could carry an adapter"):
        attach(DECODERS["falcon"].make(), METHODS["lora-fa"])


@pytest.mark.parametrize("method", ["owlore", "galore"])
def test_low_rank_methods_say_where_no_layer_can_carry_a_slot(method: str) -> None:
    """A Falcon's blocks train at full rank then; other models give no such warning."""
    with pytest.warns(UserWarning, match="no linear layer in the blocks of Falcon.* can carry a"):
        attach(DECODERS["falcon"].make(), METHODS[method])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(llama(), METHODS[method])


@pytest.mark.parametrize("make", [phimoe, llama4], ids=["phimoe", "llama4"])
def test_a_router_trains_in_full_beside_slots(make: Any) -> None:
    """In the active blocks of OwLore it is the model's own module, with its own parameter in the optimizer."""
    model = make()
    routers = {path: module for path, module in model.named_modules() if path.endswith("router")}
    optimizer = attach(model, OwLore(active_layers=len(model.model.layers), rank=4, scores="uniform"), lr=5e-3)
    assert routers
    before = snapshot(model)
    train(model, optimizer, tokens())
    for path, router in routers.items():
        assert model.get_submodule(path) is router
        assert f"{path}.weight" in changed(model, before)
    assert any(isinstance(module, LowRankLinear) for module in model.model.layers.modules())
