"""A whole step within a period, captured as a CUDA graph, trains as steps that are launched one by one."""

from __future__ import annotations

import pytest
import torch
from families import llama
from torch import Tensor

import lisa_kernels
from device.simulated import waits
from device.training import batch
from lisa_kernels import attach

PERIOD = 50
METHODS = {
    "full": lisa_kernels.FullFineTune(),
    "lisa": lisa_kernels.LISA(2, PERIOD),
    "lora": lisa_kernels.LoRA(rank=4, embeddings="frozen"),
}
# State is made in the first; a graph must find it there.
BEFORE, REPLAYED = 3, 3


def trained(name: str, replay: bool) -> tuple[list[float], list[Tensor]]:
    """Return the losses of all steps and the weights at the end, of steps launched or of a graph replayed."""
    model = llama().to("cuda", torch.bfloat16)
    model.config.use_cache = False
    opt = attach(model, METHODS[name], lr=1e-3)
    inputs = {key: value.clone() for key, value in batch("cuda", 0).items()}
    losses = []

    def step() -> Tensor:
        loss: Tensor = model(**inputs).loss
        loss.backward()
        opt.step()
        # Gradients stay where the graph has them.
        opt.zero_grad(set_to_none=False)
        return loss.detach()

    for number in range(BEFORE + REPLAYED):
        for key, value in batch("cuda", number).items():
            inputs[key].copy_(value)
        if number == BEFORE and replay:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                loss = step()
        if number < BEFORE or not replay:
            loss = step()
        else:
            with waits() as noted:
                graph.replay()
            assert not noted
        losses.append(loss.clone())
    torch.cuda.synchronize()
    return [float(loss) for loss in losses], [param.detach().cpu() for param in model.parameters()]


@pytest.mark.order("eager")
@pytest.mark.parametrize("name", METHODS)
def test_a_replayed_step_is_the_step(name: str) -> None:
    """To the bit, stochastic rounding among it: what changes from step to step is counted on the device."""
    losses, weights = trained(name, replay=True)
    wanted, others = trained(name, replay=False)
    assert losses == wanted
    assert len(set(losses)) == len(losses)
    assert all(torch.equal(weight, other) for weight, other in zip(weights, others))
