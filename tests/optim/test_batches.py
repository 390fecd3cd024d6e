"""A step is taken on all parameters at once, in lists; none of them may feel the others."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lisa_kernels.errors import InputError
from lisa_kernels.ops.random_bits import keys_at, random_key
from lisa_kernels.optim import AdamW8bit
from lisa_kernels.optim.batches import KeyBases, Kind, gather

from .steps import LR, normal, parameters, run, set_gradients

CPU = torch.device("cpu")


def group(params: list[nn.Parameter], **changed: float) -> dict[str, object]:
    return {"params": params, "lr": LR, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, **changed}


def state_of(param: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"step": torch.ones((), dtype=torch.int64), **({"m_codes": param} if param.dim() > 1 else {})}


def test_one_batch_holds_one_kind_of_state_and_keeps_the_groups_apart() -> None:
    first, second = parameters(), parameters(torch.bfloat16)
    for params in (first, second):
        set_gradients(params, 0)
    batches = gather([group(first), group(second, lr=2 * LR)], state_of)
    assert [batch.kind for batch in batches] == [Kind(CPU, True), Kind(CPU, False)]
    assert batches[0].params == [*first[:2], *second[:2]]
    assert [(hyper.lr, end) for hyper, end in batches[0].groups] == [(LR, 2), (2 * LR, 4)]
    assert [(hyper.lr, end) for hyper, end in batches[1].groups] == [(LR, 1), (2 * LR, 2)]


def test_parameters_without_gradient_or_elements_are_left_out() -> None:
    still, empty, moving = parameters()[0], nn.Parameter(torch.zeros(0, 3)), parameters()[2]
    empty.grad, moving.grad = torch.zeros(0, 3), torch.ones(300)
    batches = gather([group([still, empty]), group([moving])], state_of)
    assert [batch.params for batch in batches] == [[moving]]
    assert gather([group([still])], state_of) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_parameter_moves_as_it_would_without_the_others(dtype: torch.dtype, device: torch.device) -> None:
    together = parameters(dtype, device)
    run(AdamW8bit(together, lr=LR), together, range(3))
    for index in range(3):
        alone = parameters(dtype, device)
        optimizer = AdamW8bit(alone, lr=LR)
        for step in range(3):
            set_gradients(alone, step)
            for other in range(3):
                if other != index:
                    alone[other].grad = None
            optimizer.step()
        assert torch.equal(alone[index], together[index])


def test_parameters_at_different_counts_of_updates_are_corrected_each_by_its_own() -> None:
    """A layer that joins late takes a first step of the size of the learning rate."""
    old, new = (nn.Parameter(torch.zeros(64, 64)) for _ in range(2))
    optimizer = AdamW8bit([old, new], lr=LR, weight_decay=0.0)
    old.grad = torch.ones(64, 64)
    for _ in range(50):
        optimizer.step()
    before = old.detach().clone()
    new.grad = torch.full((64, 64), 1e-3)
    optimizer.step()
    assert new.detach().mean().item() == pytest.approx(-LR, rel=1e-3)
    assert (old.detach() - before).mean().item() == pytest.approx(-LR, rel=0.05)


def test_weights_that_a_graph_still_needs_are_seen_to_have_changed() -> None:
    param = nn.Parameter(normal(64, 64))
    loss = (param * param).sum()
    param.grad = normal(64, 64, seed=1)
    AdamW8bit([param]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_gradient_on_another_device_is_refused() -> None:
    """Only a parameter whose data was moved by hand can have one: torch refuses to assign it."""
    moved = SimpleNamespace(grad=torch.ones(3), device=torch.device("meta"), numel=lambda: 3)
    with pytest.raises(InputError, match="gradient is on cpu and its parameter on meta"):
        gather([group([moved])], state_of)  # type: ignore[list-item]


def test_keys_follow_seed_index_and_clock() -> None:
    bases, clock = KeyBases(), torch.tensor(9)
    for seed in (0, 1):
        for indices in [(0, 1, 2), (2,), (5, 1)]:
            wanted = [int(random_key(seed, index, clock)) for index in indices]
            assert keys_at(bases.on(CPU, seed, indices), clock).tolist() == wanted
            assert keys_at(bases.on(CPU, seed, indices), clock + 1).tolist() != wanted


def test_keys_of_layers_that_left_are_forgotten() -> None:
    bases = KeyBases()
    for index in range(100):
        bases.on(CPU, 0, (index,))
    assert len(bases._bases) <= 8
