"""Linears without a slot stay the modules they are, with the same results, and get products that CPUs can bear."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import gpt2, llama, tokens
from slow_products import HalfProducts, have_no_matrix_units

from lisa_kernels import LISA, OwLore, attach, layer_scores
from lisa_kernels.layers import PlainLinears, find_blocks
from lisa_kernels.methods import Method
from lisa_kernels.scores import compute_scores


@pytest.fixture(autouse=True)
def slow_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    have_no_matrix_units(monkeypatch)


def products_of_a_step(model: Any) -> int:
    """Return how many slow products a forward and a backward take."""
    with HalfProducts() as slow:
        model(**tokens()).loss.backward()
    return slow.count


METHODS = {
    "lisa": LISA(active_layers=1, period=1),
    "owlore": OwLore(active_layers=1, period=1, rank=4, scores="uniform", embeddings="frozen"),
}


@pytest.mark.parametrize("build", [llama, gpt2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("method", METHODS)
def test_a_16_bit_step_takes_none_of_torchs_slow_products(build: Any, method: str) -> None:
    model = build().bfloat16()
    assert products_of_a_step(model) > 0
    optimizer = attach(model, METHODS[method])
    model.zero_grad()
    # The first step finds bases, the second uses them.
    for _ in range(2):
        assert products_of_a_step(model) == 0
        optimizer.step()
        optimizer.zero_grad()
    optimizer.detach()
    assert products_of_a_step(model) > 0


def test_autocast_takes_none_of_torchs_slow_products_either() -> None:
    model = llama()
    attach(model, METHODS["lisa"])
    with torch.autocast("cpu", torch.bfloat16):
        assert products_of_a_step(model) == 0


@pytest.mark.parametrize("kind", ["outlier", "gradient-norm"])
@pytest.mark.parametrize("build", [llama, gpt2], ids=["llama", "gpt2"])
def test_scores_take_none_of_torchs_slow_products_either(build: Any, kind: str) -> None:
    """But for the logits of one token; they are what torch's own give, to rounding."""
    model = build().bfloat16()
    _, blocks = find_blocks(model)
    expected = compute_scores(kind, model, blocks, [tokens()], threshold=3.0)
    with HalfProducts() as slow:
        found = layer_scores(model, kind, [tokens()], threshold=3.0)
    assert slow.count <= (kind == "outlier")
    assert found == pytest.approx(expected, rel=0.05)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("build", [llama, gpt2], ids=["llama", "gpt2"])
def test_results_are_the_models_own_to_16_bit_rounding(build: Any) -> None:
    model = build().bfloat16().eval()
    plain = model(**tokens()).logits.detach()
    linears = PlainLinears(model)
    fast = model(**tokens()).logits.detach()
    assert float((fast - plain).float().norm() / plain.float().norm()) < 0.02
    linears.remove()
    assert torch.equal(model(**tokens()).logits, plain)


def test_a_copy_of_the_model_has_layers_of_its_own() -> None:
    model = llama().bfloat16()
    PlainLinears(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    assert twin(**tokens()).logits.abs().max() == 0
    assert model(**tokens()).logits.abs().max() > 0


def test_a_cpu_with_matrix_units_keeps_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lisa_kernels.layers.plain_linears.has_matrix_units", lambda dtype: True)
    model = llama()
    PlainLinears(model)
    assert not any("forward" in vars(module) for module in model.modules())


def test_methods_are_attached_and_detached_as_before() -> None:
    method: Method = METHODS["owlore"]
    model = llama().bfloat16()
    before = {name: type(module) for name, module in model.named_modules()}
    attach(model, method).detach()
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert not any("forward" in vars(module) for module in model.modules())
