"""A checkpoint that ranks wrote together goes on as the run did, on another number of ranks and on one."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed.ranks import on_ranks
from distributed.runs import batch, model_of
from distributed.test_fully_sharded import sharded

from lisa_kernels import LISA, LoRA, OwLore, attach
from lisa_kernels.distributed import whole
from lisa_kernels.methods import SampledAdamW

# Layers on the shelf with their bases and remainders, codes of full rank, and adapters beside their weights.
METHODS = {
    "owlore": OwLore(
        active_layers=2, period=3, rank=8, gap=2, scores="uniform", embeddings="frozen", master="remainder",
        retired_state="page",
    ),
    "lisa": LISA(active_layers=2, period=3),
    "lora": LoRA(rank=8),
}  # fmt: skip


def attached(name: str, seed: int, shards: bool) -> SampledAdamW:
    model = model_of(dtype=torch.bfloat16)
    if shards:
        sharded(model)
    return attach(model, METHODS[name], lr=3e-3, seed=seed)


def steps(optimizer: SampledAdamW, start: int, end: int) -> None:
    """Take steps on rows that all ranks share, whose mean gradient is that of one rank."""
    for step in range(start, end):
        optimizer.model(**batch(step, 0)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def weights(optimizer: SampledAdamW) -> dict[str, torch.Tensor]:
    return {name: whole(param.detach()).clone() for name, param in optimizer.model.named_parameters() if param.numel()}


def save(rank: int, folder: Path) -> dict[str, Any]:
    """Save in the middle; returns what the run became, twice over so that an older folder is replaced."""
    warnings.simplefilter("ignore")
    found = {}
    for name in METHODS:
        optimizer = attached(name, 0, shards=True)
        steps(optimizer, 0, 2)
        optimizer.save_shards(folder / name)
        steps(optimizer, 2, 4)
        optimizer.save_shards(folder / name)
        steps(optimizer, 4, 7)
        found[name] = weights(optimizer)
    return {name: {key: value.float().numpy() for key, value in each.items()} for name, each in found.items()}


def load(rank: int, folder: Path) -> dict[str, Any]:
    """Go on from the folder with a model of other weights and seed."""
    warnings.simplefilter("ignore")
    found = {}
    for name in METHODS:
        optimizer = attached(name, 5, shards=rank >= 0)
        for path, param in optimizer.model.named_parameters():
            if not path.endswith("slot"):
                torch.no_grad()(param.add_)(0.125)
        optimizer.load_shards(folder / name)
        steps(optimizer, 4, 7)
        found[name] = weights(optimizer)
    return {name: {key: value.float().numpy() for key, value in each.items()} for name, each in found.items()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("shards")
    return folder, on_ranks(save, folder)[0]


def check(found: dict[str, Any], expected: dict[str, Any], name: str) -> None:
    assert found[name].keys() == expected[name].keys()
    assert [key for key in found[name] if not (found[name][key] == expected[name][key]).all()] == []


def test_one_process_goes_on_from_what_two_ranks_wrote(saved: tuple[Path, dict[str, Any]]) -> None:
    """Bit for bit, with whole weights; a folder is there whole or not at all."""
    folder, expected = saved
    found = load(-1, folder)
    for name in METHODS:
        check(found, expected, name)
        assert [each.name for each in folder.glob(f"{name}*")] == [name]


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_any_number_of_ranks_goes_on(count: int, saved: tuple[Path, dict[str, Any]]) -> None:
    folder, expected = saved
    for found in on_ranks(load, folder, count=count):
        for name in METHODS:
            check(found, expected, name)
