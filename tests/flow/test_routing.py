"""Models that know nothing of routes, run by one: lists of blocks, clocks, and what cannot be routed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lisa_kernels import InputError, TimestepExperts, attach
from lisa_kernels.flow import Clock, Intervals, route_model, unroute_model

from .small_flow import SmallFlow, examples, small_flow, train

THIRDS = Intervals.make(3, "uniform")


def ran(model: SmallFlow, t: Tensor | float, rows: int = 4, **more: Any) -> list[int]:
    """Return the numbers of the blocks that a forward runs."""
    blocks = list(model.blocks)
    before = [block.runs for block in blocks]
    noise, _, label = examples(0, rows)
    model(noise, torch.full((rows,), t) if isinstance(t, float) else t, label, **more)
    return [number for number, (block, was) in enumerate(zip(blocks, before)) if block.runs > was]


def test_a_forward_runs_the_group_of_its_time() -> None:
    """Exactly one group's blocks, by place or by name; between forwards all blocks are there, under their names."""
    model = small_flow()
    names = list(model.state_dict())
    route_model(model, THIRDS)
    assert [ran(model, t) for t in (0.0, 0.4, 1.0)] == [[0, 1], [2, 3], [4, 5]]
    noise, _, label = examples(0)
    model(x=noise, label=label, t=torch.zeros(4))
    assert len(model.blocks) == 6
    assert list(model.state_dict()) == names


def test_a_forward_that_fails_leaves_all_blocks_visible() -> None:
    """A wrong batch is the user's to see; the next forward is right again."""
    model = small_flow()
    route_model(model, THIRDS)
    with pytest.raises(RuntimeError):
        model(torch.zeros(4, 99), torch.zeros(4), torch.zeros(4, dtype=torch.int64))
    assert len(model.blocks) == 6
    assert ran(model, 0.9) == [4, 5]


def test_a_batch_of_several_groups_is_refused() -> None:
    """Never routed by its mean."""
    model = small_flow()
    route_model(model, THIRDS)
    with pytest.raises(InputError, match="split the batch"):
        ran(model, torch.linspace(0, 1, 4))


def test_routing_can_be_undone_and_done_again() -> None:
    """Then a forward runs all blocks, in a plain list."""
    model = small_flow()
    route_model(model, THIRDS)
    assert route_model(model, THIRDS) is route_model(model, THIRDS)
    unroute_model(model)
    assert type(model.blocks) is nn.ModuleList
    assert ran(model, 0.5) == [0, 1, 2, 3, 4, 5]
    route_model(model, Intervals.make(2))
    assert ran(model, 0.6) == [3, 4, 5]


def test_a_copy_runs_by_a_route_of_its_own() -> None:
    """As averaged weights are kept: the copy is routed too, and undoing that leaves the model as it was."""
    model = small_flow()
    optimizer: Any = attach(model, TimestepExperts(groups=3), lr=1e-3)
    twin = copy.deepcopy(model).eval()
    assert ran(twin, 0.5) == [2, 3]
    train(model, optimizer, 0, 1)
    unroute_model(twin)
    assert ran(twin, 0.5) == [0, 1, 2, 3, 4, 5]
    assert ran(model.eval(), 0.9) == [4, 5]


def test_a_clock_that_runs_backwards_is_read_and_written() -> None:
    """A diffusion model's steps from 1,000, noise, to 0, data."""
    clock = Clock("t", noise=1000, data=0)
    t = torch.tensor([0.0, 0.25, 1.0])
    assert clock.of(t).tolist() == [1000.0, 750.0, 0.0]
    assert clock.read(clock.of(t)).tolist() == t.tolist()  # type: ignore[union-attr]
    model = small_flow()
    route_model(model, THIRDS, clock=clock)
    assert [ran(model, float(step)) for step in (1000, 500, 10)] == [[0, 1], [2, 3], [4, 5]]


def test_whole_steps_of_a_clock_may_train() -> None:
    """Rounded to a step, a time may lie beyond its interval by one; by two it is another group's."""
    model = small_flow(layers=8)
    router = route_model(model, Intervals.make(4), clock=Clock("t", 10, 0))
    router.route.active = 1
    assert ran(model, torch.tensor([7, 6, 5, 8])) == [2, 3]
    noise, _, label = examples(0)
    with pytest.raises(InputError, match="group 1, which trains now"):
        model(noise, torch.tensor([7, 6, 5, 9]), label)
    with pytest.raises(InputError, match="group 1, which trains now"):
        model(noise, torch.tensor([7.0, 6.0, 5.0, 8.0]), label)
    # 7.53 is no bfloat16.
    model(noise, torch.tensor([7.53, 6.0, 5.0, 5.0], dtype=torch.bfloat16), label)


@pytest.mark.parametrize(("noise", "data"), [(1.0, 1.0), ("1", 0.0)])
def test_a_clock_that_stands_still_is_refused(noise: Any, data: Any) -> None:
    """There would be nothing to tell the time by."""
    with pytest.raises(InputError, match="two"):
        Clock(noise=noise, data=data)


def test_another_convention_of_time_is_refused() -> None:
    """Steps of a diffusion model read as t from 0 to 1, or another clock than that the model runs by."""
    model = small_flow()
    route_model(model, THIRDS)
    with pytest.raises(InputError, match="another convention"):
        ran(model, 500.0)
    with pytest.raises(InputError, match="give that of the model"):
        route_model(model, THIRDS, clock=Clock("t", 1000, 0))
    with pytest.raises(InputError, match="give those of the model"):
        route_model(model, Intervals.make(3, [0.0, 0.2, 0.4, 1.0]))


class Renamed(SmallFlow):
    """Calls the time sigma."""

    def forward(self, x: Tensor, sigma: Tensor | None, label: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, sigma, label)  # type: ignore[arg-type]


def test_an_argument_without_a_known_name_is_asked_for() -> None:
    """And one that is left out of a forward."""
    with pytest.raises(InputError, match=r"no argument t or .*it has x, sigma, label"):
        route_model(Renamed(), THIRDS)
    model = Renamed()
    route_model(model, THIRDS, clock=Clock("sigma", noise=1.0, data=0.0))
    assert ran(model, 0.9) == [0, 1]
    with pytest.raises(InputError, match="the forward was given no sigma"):
        model(torch.zeros(4, 12), None, torch.zeros(4, dtype=torch.int64))


class Fixed(SmallFlow):
    """Holds its blocks in a tuple beside the list."""

    def __init__(self) -> None:
        super().__init__()
        self.fixed = tuple(self.blocks)

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        hidden = self.embed(x)
        for block in self.fixed:
            hidden = block(hidden, self.label(label))
        velocity: Tensor = self.head(hidden)
        return velocity


def test_a_forward_that_does_not_look_at_the_list_is_refused() -> None:
    """It would run all blocks, whatever the time."""
    model = Fixed()
    route_model(model, THIRDS)
    with pytest.raises(InputError, match="does not go through the list of its blocks"):
        ran(model, 0.5)


class Wrapped(nn.Module):
    """Gives the time to a network inside, in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.network = small_flow()

    def forward(self, images: Tensor, label: Tensor) -> Tensor:
        velocity: Tensor = self.network(images, torch.full((len(images),), 0.9), label)
        return velocity


def test_the_time_is_read_where_it_is_given() -> None:
    """A wrapper that has no time itself is looked through."""
    model = Wrapped()
    route_model(model, THIRDS, blocks="network.blocks")
    blocks = list(model.network.blocks)
    model(torch.zeros(2, 12), torch.zeros(2, dtype=torch.int64))
    assert [block.runs for block in blocks] == [0, 0, 0, 0, 1, 1]


def dit() -> Any:
    """Return a small DiT of diffusers."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed; its DiT is a model of others")
    torch.manual_seed(0)
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, num_layers=4, sample_size=8, patch_size=2,
        num_embeds_ada_norm=10,
    )  # fmt: skip


def test_a_dit_of_diffusers_trains_in_groups() -> None:
    """Its output layer reads the conditioning of block 0: of the group's first block, so that it trains too."""
    model = dit()
    optimizer: Any = attach(
        model, TimestepExperts(groups=2, resting_weights="page", clock=Clock("timestep", 1000, 0)), lr=1e-3
    )
    labels = torch.arange(4)
    for group in (0, 1):
        steps = optimizer.method.clock.of(optimizer.times(4))
        model(torch.randn(4, 4, 8, 8), timestep=steps, class_labels=labels).sample.square().mean().backward()
        blocks = [model.get_submodule(f"transformer_blocks.{number}") for number in range(4)]
        trained = [all(param.grad is not None for param in block.parameters()) for block in blocks]
        assert trained == [group == 0, group == 0, group == 1, group == 1]
        assert not any(param.grad is not None for n in (2, 3) for param in blocks[(n + 2 * group) % 4].parameters())
        optimizer.step()
        optimizer.zero_grad()
    optimizer.detach()


def test_a_dit_of_diffusers_runs_as_the_smaller_dit_of_one_group() -> None:
    """Bit for bit, the output layer's conditioning included."""
    model = dit().eval()
    route_model(model, Intervals.make(2), clock=Clock("timestep", 1000, 0))
    small = type(model).from_config({**model.config, "num_layers": 2}).eval()
    second = {
        name.replace("blocks.2.", "blocks.0.").replace("blocks.3.", "blocks.1."): value
        for name, value in model.state_dict().items()
        if "blocks.0." not in name and "blocks.1." not in name
    }
    small.load_state_dict(second)
    inputs = {"timestep": torch.tensor([100, 7]), "class_labels": torch.tensor([1, 2])}
    images = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        assert torch.equal(model(images, **inputs).sample, small(images, **inputs).sample)
