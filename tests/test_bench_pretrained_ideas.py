"""What is tried beside the methods: each change does what its name says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from bench.pretrained_ideas import (
    FlooredOwLore,
    GentleOwLore,
    RankedGaLore,
    WarmedOwLore,
    WeighedOwLore,
    by_spectrum,
    share_out,
)
from lisa_kernels import OwLore, attach
from lisa_kernels.methods import Method
from lisa_kernels.methods.sampled_adamw import SampledAdamW
from lisa_kernels.train.models import load_model


def attached(method: Method) -> tuple[nn.Module, SampledAdamW]:
    model = load_model("preset:tiny", torch.float32, 0)
    return model, attach(model, method, lr=1e-3, weight_decay=0.0, seed=3)


def train(model: nn.Module, optimizer: SampledAdamW, steps: int) -> None:
    ids = torch.arange(2, 26).view(2, 12)
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def ranks(optimizer: SampledAdamW) -> list[set[int]]:
    return [{layer.slot.shape[0] for layer in unit.lowrank.values()} for unit in optimizer.layout.drawn]


def test_layers_over_a_floor_learn_in_few_directions_while_they_rest() -> None:
    model, optimizer = attached(FlooredOwLore(1, 2, rank=8, above=16, floor=4, scores="uniform"))
    before = [
        unit.lowrank and next(iter(unit.lowrank.values())).stored_weight.clone() for unit in optimizer.layout.drawn
    ]
    for _ in range(3):
        assert ranks(optimizer) == [{16} if n in optimizer.active_layers else {4} for n in range(len(before))]
        train(model, optimizer, 2)
    moved = [next(iter(unit.lowrank.values())).stored_weight for unit in optimizer.layout.drawn]
    assert len(optimizer.history) == 4
    assert not any(torch.equal(now, was) for now, was in zip(moved, before))


def test_importance_weights_are_the_probabilities_the_other_way_round() -> None:
    _, optimizer = attached(WeighedOwLore(1, 1, rank=8, scores=(4.0, 2.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0)))
    scales = [next(iter(unit.lowrank.values())).scale for unit in optimizer.layout.drawn]
    assert scales == pytest.approx([0.5, 1.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0])


@pytest.mark.parametrize("warm_up", [1, 4])
def test_a_warm_up_makes_a_layers_first_step_smaller(warm_up: int) -> None:
    """By as many times as it has steps, for the first step of Adam's is the sign of the gradient."""
    moved = []
    for method in (
        OwLore(1, 9, rank=8, scores="uniform"),
        WarmedOwLore(1, 9, rank=8, scores="uniform", warm_up=warm_up),
    ):
        model, optimizer = attached(method)
        layer = next(iter(optimizer.layout.drawn[optimizer.active_layers[0]].lowrank.values()))
        before = layer.stored_weight.clone()
        train(model, optimizer, 1)
        moved.append((layer.stored_weight - before).norm())
    assert float(moved[0] / moved[1]) == pytest.approx(warm_up, rel=1e-3)


def test_embeddings_go_at_a_quarter_of_the_rate() -> None:
    """Adam's first step is the sign of the gradient, so that it shows in full."""
    moved = []
    for method in (OwLore(1, 9, rank=8, scores="uniform"), GentleOwLore(1, 9, rank=8, scores="uniform")):
        model, optimizer = attached(method)
        table = model.get_input_embeddings().weight
        before = table.detach().clone()
        train(model, optimizer, 1)
        moved.append((table.detach() - before).norm())
    assert float(moved[0] / moved[1]) == pytest.approx(4, rel=1e-3)


def test_ranks_by_spectrum_cost_what_one_rank_for_all_does() -> None:
    steep, flat = torch.tensor([0.9, 0.1] + [0.0] * 30), torch.full((32,), 1 / 32)
    assert share_out({"steep": steep, "flat": flat}, {"steep": 10, "flat": 10}, 16) == {"steep": 4, "flat": 28}
    model = load_model("preset:tiny", torch.float32, 0)
    ids = torch.arange(2, 26).view(2, 12)
    method = by_spectrum(RankedGaLore(rank=8), model, [{"input_ids": ids, "labels": ids}])
    optimizer = attach(model, replace(method, scale=1.0), lr=1e-3)
    layers = [layer for unit in optimizer.layout.drawn for layer in unit.lowrank.values()]
    costs = [layer.in_features + layer.out_features for layer in layers]
    spent = sum(layer.slot.shape[0] * cost for layer, cost in zip(layers, costs))
    assert 0.97 * 8 * sum(costs) <= spent <= 8 * sum(costs)
    assert len({layer.slot.shape[0] for layer in layers}) > 1
    train(model, optimizer, 2)
