"""A compiled model trains as the same model uncompiled, switches of layers included."""

from __future__ import annotations

import pytest
import torch
from families import llama, tokens
from torch import Tensor

from lisa_kernels import LISA, OwLore, attach
from lisa_kernels.methods import Method

METHODS: dict[str, Method] = {
    "owlore": OwLore(active_layers=1, period=2, rank=4, scores="uniform", embeddings="frozen"),
    "lisa": LISA(active_layers=1, period=2),
    "low-rank": OwLore(active_layers=1, period=2, rank=4, scores="uniform", embeddings="low-rank"),
}


def trained(method: Method, compiled: bool) -> tuple[list[float], list[Tensor]]:
    """Return the losses of three steps, the layers switched after two, and the weights."""
    torch.compiler.reset()
    model = llama(layers=2)
    optimizer = attach(model, method, lr=1e-2)
    # Traced and run as torch's own kernels: what a compiler makes of them is not under test here.
    forward = torch.compile(model, backend="eager") if compiled else model
    losses = []
    for step in range(3):
        loss = forward(**tokens(seed=step)).loss
        loss.backward()
        losses.append(float(loss))
        optimizer.step()
        optimizer.zero_grad()
    optimizer.detach()
    return losses, [param.detach() for param in model.parameters()]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo detected a call")
@pytest.mark.parametrize("method", METHODS)
def test_a_compiled_model_trains_alike(method: str) -> None:
    losses, weights = trained(METHODS[method], compiled=True)
    wanted_losses, wanted = trained(METHODS[method], compiled=False)
    assert losses == pytest.approx(wanted_losses, rel=1e-5)
    # Sums may be taken in another order, which Adam's first steps raise to a share of the rate.
    for weight, other in zip(weights, wanted):
        torch.testing.assert_close(weight, other, rtol=0.0, atol=1e-3)
    assert losses[2] != losses[0]
