"""Hill alpha and weight norm against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lisa_kernels.errors import InputError
from lisa_kernels.scores.spectra import hill_alphas, weight_norms

from .tiny_models import MODELS


def defined_alpha(weight: torch.Tensor) -> float:
    """Return Hill's estimate from the ascending eigenvalues of the smaller Gram matrix, in fp64."""
    weight = weight.detach().double()
    gram = weight.T @ weight if weight.shape[0] >= weight.shape[1] else weight @ weight.T
    eigenvalues = torch.linalg.eigvalsh(gram)
    n = len(eigenvalues)
    k = n // 2
    return 1 + k / (sum(math.log(value) for value in eigenvalues[n - k :]) - k * math.log(eigenvalues[n - k - 1]))


@pytest.mark.parametrize("name", MODELS)
def test_alphas_equal_the_definition(name: str) -> None:
    _, blocks = MODELS[name]()
    for block, alpha in zip(blocks, hill_alphas(blocks)):
        expected = [defined_alpha(parameter) for parameter in block.parameters() if parameter.ndim == 2]
        assert alpha == pytest.approx(sum(expected) / len(expected), rel=1e-4)


def diagonal(values: list[float]) -> nn.Module:
    layer = nn.Linear(len(values), len(values), bias=False)
    layer.weight.data = torch.tensor(values).diag()
    return layer


def test_a_heavier_tail_has_a_smaller_alpha() -> None:
    light, heavy = hill_alphas([diagonal([1.0, 1.0, 1.1, 1.2]), diagonal([1.0, 1.0, 10.0, 100.0])])
    assert heavy < light
    assert heavy == pytest.approx(1 + 2 / (2 * math.log(1000)))


def test_alpha_does_not_depend_on_the_scale() -> None:
    assert hill_alphas([diagonal([1.0, 2.0, 3.0])]) == pytest.approx(hill_alphas([diagonal([10.0, 20.0, 30.0])]))


def test_a_matrix_of_low_rank_has_a_finite_alpha() -> None:
    assert 1 < hill_alphas([diagonal([0.0, 0.0, 0.0, 5.0])])[0] < 2


def test_a_flat_spectrum_has_an_infinite_alpha() -> None:
    assert hill_alphas([diagonal([2.0] * 4)]) == [math.inf]


def test_matrices_of_zeros_and_of_one_row_are_left_out() -> None:
    block = nn.ModuleList([diagonal([1.0, 2.0, 3.0, 4.0]), diagonal([0.0, 0.0]), nn.Linear(4, 1)])
    assert hill_alphas([block]) == hill_alphas([block[0]])


def test_a_block_without_a_spectrum_is_refused() -> None:
    with pytest.raises(InputError, match="block 0"):
        hill_alphas([nn.LayerNorm(4)])


def test_weights_that_are_not_finite_are_refused() -> None:
    with pytest.raises(InputError, match="not finite"):
        hill_alphas([diagonal([1.0, math.nan])])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_norms_equal_the_norm_of_all_matrices_concatenated(dtype: torch.dtype) -> None:
    model, blocks = MODELS["llama"]()
    model.to(dtype)
    for block, norm in zip(blocks, weight_norms(blocks)):
        flat = torch.cat([p.detach().double().flatten() for p in block.parameters() if p.ndim == 2])
        assert norm == pytest.approx(flat.norm().item(), rel=1e-5)
