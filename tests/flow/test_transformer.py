"""A flow transformer whose groups are experts: what runs, and what it is equal to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lisa_kernels import InputError, TimestepExperts, attach
from lisa_kernels.flow import Intervals
from lisa_kernels.flow.transformer import FlowShape, FlowTransformer


def shape(**changed: Any) -> FlowShape:
    sizes = {"channels": 1, "height": 8, "width": 8, "classes": 3, "hidden": 32, "heads": 2, "layers": 8}
    return FlowShape(**{**sizes, **changed})


def woken(model: FlowTransformer, seed: int = 1) -> FlowTransformer:
    """Give weights that begin at zero values, so that every part counts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            if not param.any():
                param.copy_(torch.randn(param.shape, generator=generator) * 0.1)
    return model


def flow(groups: int = 4, seed: int = 0, **changed: Any) -> FlowTransformer:
    torch.manual_seed(seed)
    return woken(FlowTransformer(shape(**changed), Intervals.make(groups, "uniform"))).eval()


def inputs(rows: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(rows, 1, 8, 8, generator=generator), torch.arange(rows) % 3


def runs(model: FlowTransformer) -> list[int]:
    """Return a list that grows by the number of each block that runs."""
    ran: list[int] = []
    for number, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    return ran


@pytest.mark.parametrize("group", range(4))
def test_an_evaluation_runs_the_layers_of_one_group(group: int) -> None:
    model = flow()
    ran = runs(model)
    x, labels = inputs()
    model(x, torch.full((3,), group / 4 + 0.1), labels)
    assert ran == [2 * group, 2 * group + 1]


@pytest.mark.parametrize("reuse", ["none", "before", "after"])
def test_groups_of_equal_weights_are_a_dense_model_of_one_group_s_depth(reuse: str) -> None:
    """Bit for bit, at every time."""
    experts, dense = flow(reuse=reuse), flow(1, layers=2, reuse=reuse)
    for name, part in dense.named_children():
        if name != "blocks":
            experts.get_submodule(name).load_state_dict(part.state_dict())
    for number, block in enumerate(experts.blocks):
        block.load_state_dict(dense.blocks[number % 2].state_dict())
    x, labels = inputs()
    for t in (0.0, 0.3, 0.5, 0.99, 1.0):
        times = torch.full((3,), t)
        assert torch.equal(experts(x, times, labels), dense(x, times, labels))


def test_a_batch_of_several_groups_is_computed_group_by_group() -> None:
    """As each image alone, and never by the mean of the times."""
    model = flow()
    ran = runs(model)
    x, labels = inputs(3)
    times = torch.tensor([0.05, 0.95, 0.1])
    together = model(x, times, labels)
    assert ran == [0, 1, 6, 7]
    for place in range(3):
        alone = model(x[place : place + 1], times[place : place + 1], labels[place : place + 1])
        torch.testing.assert_close(together[place : place + 1], alone)


def test_in_training_the_active_group_runs_and_alone_has_gradients() -> None:
    model = flow().train()
    optimizer: Any = attach(model, TimestepExperts(groups=4, boundaries="uniform"), lr=1e-3, blocks="blocks")
    ran = runs(model)
    x, labels = inputs()
    for group in (0, 1):
        ran.clear()
        model(x, optimizer.times(3), labels).square().mean().backward()
        assert ran == [2 * group, 2 * group + 1]
        has = [any(param.grad is not None for param in block.parameters()) for block in model.blocks]
        assert has == [number // 2 == group for number in range(8)]
        assert all(param.grad is not None for param in model.head.parameters())
        optimizer.step()
        optimizer.zero_grad()


def test_a_model_of_the_same_form_takes_its_weights() -> None:
    model = flow(reuse="before")
    again = model.like()
    again.load_state_dict(model.state_dict())
    x, labels = inputs()
    assert torch.equal(again.eval()(x, torch.full((3,), 0.6), labels), model(x, torch.full((3,), 0.6), labels))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"patch": 3}, "patches of 3"),
        ({"heads": 3}, "3 heads do not divide"),
        ({"layers": 6}, "6 layers do not divide into 4 groups"),
        ({"reuse": "befor"}, "did you mean 'before'"),
        ({"hidden": 0}, "at least 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        flow(**changed)


def test_times_and_images_that_do_not_fit_are_refused() -> None:
    model = flow()
    x, labels = inputs()
    with pytest.raises(InputError, match="made for"):
        model(x[..., :4], torch.zeros(3), labels)
    with pytest.raises(InputError, match="one for each"):
        model(x, torch.zeros(2), labels)
    with pytest.raises(InputError, match=r"a time is 1\.5"):
        model(x, torch.full((3,), 1.5), labels)
