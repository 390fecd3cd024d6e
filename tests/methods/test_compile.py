"""A compiled model trains as the same model uncompiled, switches of layers included."""

from __future__ import annotations

import pytest
import torch
from families import llama, tokens
from torch import Tensor, nn
from torch._dynamo.utils import counters

from lisa_kernels import LISA, BAdam, GaLore, LoRA, OwLore, attach, checkpoint_blocks, compile_blocks
from lisa_kernels.errors import InputError
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


BY_BLOCKS: dict[str, Method] = {
    **METHODS,
    "badam": BAdam(period=2),
    "lora": LoRA(rank=4),
    # A refresh every fourth step, which comes to the matrices of a block one by one.
    "galore": GaLore(rank=4, gap=4),
}
STEPS = 12
# At rest, drawn, and drawn in a step that finds bases; each with and without a gradient for its input.
FORMS = 6


def trained_by_blocks(
    method: Method, backend: str | None, again: bool = False
) -> tuple[list[float], list[int], list[Tensor]]:  # fmt: skip
    """Return losses, the graphs compiled so far after each step, and the weights; backend: None for an eager run."""
    torch.compiler.reset()
    counters.clear()
    model = llama(layers=4)
    if again:
        checkpoint_blocks(model)
    optimizer = attach(model, method, lr=1e-2)
    if backend is not None:
        # A graph break is an error.
        compile_blocks(model, backend=backend, fullgraph=True)
    losses, graphs = [], []
    for step in range(STEPS):
        loss = model(**tokens(seed=step)).loss
        loss.backward()
        losses.append(loss.detach().item())
        optimizer.step()
        optimizer.zero_grad()
        graphs.append(counters["stats"]["unique_graphs"])
    optimizer.detach()
    return losses, graphs, [param.detach() for param in model.parameters()]


@pytest.mark.slow
@pytest.mark.parametrize("again", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("method", BY_BLOCKS)
def test_blocks_are_compiled_once_for_each_form_and_never_for_a_switch(method: str, again: bool) -> None:
    """Without a break; the same bits; in the last third of the run layers switch, and nothing compiles."""
    losses, graphs, weights = trained_by_blocks(BY_BLOCKS[method], "aot_eager", again)
    wanted, _, others = trained_by_blocks(BY_BLOCKS[method], None, again)
    assert losses == wanted
    assert all(torch.equal(weight, other) for weight, other in zip(weights, others))
    assert 0 < graphs[-1] <= FORMS
    assert graphs[-1] == graphs[STEPS * 2 // 3]


@pytest.mark.slow
def test_blocks_that_inductor_compiled_train_alike() -> None:
    losses, graphs, _ = trained_by_blocks(METHODS["owlore"], "inductor")
    wanted, *_ = trained_by_blocks(METHODS["owlore"], None)
    assert losses == pytest.approx(wanted, rel=1e-5)
    assert graphs[-1] <= FORMS


def test_compiling_blocks_switches_the_cache_off_and_needs_blocks() -> None:
    """Each block would be compiled for its place in the cache."""
    model = llama(layers=2)
    model.config.use_cache = True
    compile_blocks(model, backend="eager")
    assert model.config.use_cache is False
    with pytest.raises(InputError, match="block"):
        compile_blocks(nn.Sequential(nn.Linear(8, 8)))
