"""On gradients of a real model in training, bases hold what the exact SVD holds, first and refreshed."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Iterator
from statistics import fmean

import pytest
import torch
from families import build, common
from tolerances import BASIS_ENERGY
from torch import Tensor

from bench.basis import energies, record_gradients


def batches(rows: int = 4, columns: int = 64) -> Iterator[dict[str, Tensor]]:
    """Yield the bytes of a module's source, at random places, without end."""
    text = torch.tensor(list(inspect.getsource(argparse).encode()))
    generator = torch.Generator().manual_seed(0)
    while True:
        starts = torch.randint(len(text) - columns, (rows, 1), generator=generator)
        ids = text[starts + torch.arange(columns)]
        yield {"input_ids": ids, "labels": ids}


@pytest.fixture(scope="module")
def found() -> dict[str, list[float]]:
    settings = common(hidden_size=64, intermediate_size=160, vocab_size=256, num_hidden_layers=2)
    model = build("LlamaForCausalLM", "LlamaConfig", **settings)
    return energies(record_gradients(model, batches(), at=(0, 4, 8, 12)), rank=8)


@pytest.mark.parametrize("kind", ["first", "refreshed"])
def test_first_and_refreshed_bases_keep_the_energy_of_the_exact_ones(found: dict[str, list[float]], kind: str) -> None:
    """In every matrix at every time, though batches differ: a refresh is one pass from the basis of another batch."""
    assert len(found[kind]) == 2 * 7 * 3
    assert min(found[kind]) >= BASIS_ENERGY


def test_random_and_old_bases_do_not(found: dict[str, list[float]]) -> None:
    """Negative control of the measure, and what refreshes are for."""
    assert max(found["random"]) < 0.6
    assert fmean(found["kept"]) < 0.95
