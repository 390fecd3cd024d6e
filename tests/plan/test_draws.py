"""Which draws are rehearsed."""

from __future__ import annotations

import pytest

from lisa_kernels import LISA, OwLore
from lisa_kernels.methods import Method
from lisa_kernels.methods.survey import survey_model
from lisa_kernels.methods.units import make_layout
from lisa_kernels.plan.draws import GivenDraws, draws_of, every_layer

from .small_runs import LAYERS, real_model, workload


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (LISA(), [[3, 2], [1, 2]]),
        (LISA(embeddings="frozen"), [[0, 3], [1, 2]]),
        (LISA(embeddings="low-rank", rank=4), [[3, 2], [1, 2]]),
        (LISA(embeddings="with-first-block", rank=4), [[0, 3], [1, 2]]),
        (LISA(embeddings="sampled"), [[0, 3], [1, 4]]),
        (OwLore(active_layers=4, rank=4, embeddings="frozen"), [[0, 3, 2, 1], [0, 1, 2, 3]]),
    ],
    ids=lambda value: f"{value.name}-{value.embeddings}" if isinstance(value, Method) else "",
)
def test_the_costliest_draw_is_the_highest_and_reaches_the_lowest_layer(
    method: Method, expected: list[list[int]]
) -> None:
    """Where embeddings train all layers are in the graph anyway; then one evenly apart."""
    layout = make_layout(survey_model(real_model(workload("llama", method)), method))
    most, again, between = draws_of(layout, method.get("active_layers", 1))
    assert [most, between] == expected
    assert again == most
    assert all(len(set(draw)) == method.get("active_layers", 1) for draw in (most, between))


@pytest.mark.parametrize("active", range(1, LAYERS + 1))
def test_every_layer_comes(active: int) -> None:
    """Draws of one size, in which none is left out."""
    draws = every_layer(LAYERS, active)
    assert {layer for draw in draws for layer in draw} == set(range(LAYERS))
    assert {len(set(draw)) for draw in draws} == {active}


def test_given_draws_tell_their_probabilities() -> None:
    """They are a sampler like any other."""
    sampler = GivenDraws(3, [[0, 1], [2, 1]])
    assert [sampler.draw(k) for k in range(4)] == [(0, 1), (1, 2), (1, 2), (1, 2)]
    assert sampler.inclusion_probabilities() == [0.5, 1.0, 0.5]
