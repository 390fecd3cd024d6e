"""Groups that train in turn: what runs, what moves, where times come from, and runs that are stopped."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from methods.test_resume import assert_same, through_disk
from torch import Tensor, nn

from lisa_kernels import FullFineTune, InputError, TimestepExperts, attach
from lisa_kernels.flow import Intervals, Route

from .small_flow import SmallFlow, add_gradients, examples, small_flow, start, train

THREE = TimestepExperts(groups=3)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    """Return the parts of the model that moved: blocks by their number, the others by name."""
    moved = [name.split(".") for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    return {".".join(parts[:2]) if parts[0] == "blocks" else parts[0] for parts in moved}


def test_a_step_runs_and_moves_one_group_and_what_is_shared() -> None:
    """The other groups' blocks do not run, and their gradients are None."""
    model, optimizer = start(THREE)
    for group in (0, 1, 2, 0):
        assert optimizer.active_group == group
        before, ran = weights(model), [block.runs for block in model.blocks]  # type: ignore[union-attr]
        add_gradients(model, optimizer, group)
        mine = set(optimizer.route.blocks_of(group))
        for number, block in enumerate(model.blocks):
            assert all((param.grad is not None) == (number in mine) for param in block.parameters())
        optimizer.step()
        assert [block.runs - was for block, was in zip(model.blocks, ran)] == [int(n in mine) for n in range(6)]  # type: ignore[operator]
        assert changed(model, before) == {"embed", "time", "label", "head", *(f"blocks.{n}" for n in mine)}
        optimizer.zero_grad()
    assert optimizer.group_steps == [2, 1, 1]


@pytest.mark.parametrize("period", [1, 3])
def test_accumulation_stays_within_one_group(period: int) -> None:
    """Two micro-batches before each step are of the same group and of different times; `period` steps are one visit."""
    model, optimizer = start(TimestepExperts(groups=3, period=period, overlap=0.0))
    for step in range(6):
        drawn = [optimizer.times(8) for _ in range(2)]
        groups = optimizer.route.intervals.groups_of(torch.cat(drawn)).unique().tolist()
        assert groups == [step // period % 3]
        assert not torch.equal(*drawn)
        for part in range(2):
            add_gradients(model, optimizer, 2 * step + part)
        optimizer.step()
        optimizer.zero_grad()


def test_times_are_a_function_of_seed_and_step() -> None:
    """And not of what happened before: another run's third step has the same."""
    _, one = start(THREE)
    model, other = start(THREE)
    train(model, other, 0, 2)
    expected = Intervals.make(3, overlap=0.05).draw(2, 16, seed=3, step=2)
    assert torch.equal(other.times(16), expected)
    assert not torch.equal(one.times(16), expected)


def test_shared_parts_have_groups_and_a_rate_of_their_own() -> None:
    """Vectors decay nowhere; a schedule multiplies each group's own rate."""
    _, optimizer = start(TimestepExperts(groups=3, shared_rate=0.25))
    groups = {group["name"]: group for group in optimizer.param_groups}
    assert {name: group["lr"] for name, group in groups.items()} == {
        "matrices": 3e-3, "vectors": 3e-3, "shared": 7.5e-4, "shared vectors": 7.5e-4,
    }  # fmt: skip
    assert [len(group["params"]) for group in groups.values()] == [12, 24, 4, 3]
    assert [group["weight_decay"] for group in groups.values()] == [1e-2, 0.0, 1e-2, 0.0]


def test_a_schedule_can_count_the_steps_of_groups() -> None:
    """Each group warms up over its own first steps, though the scheduler steps each time."""
    model, optimizer = start(THREE)
    warm_up = [0.25, 0.5, 1.0]
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda _: warm_up[min(optimizer.group_steps[optimizer.active_group], 2)]
    )
    rates = []
    for step in range(9):
        rates.append(optimizer.param_groups[0]["lr"] / 3e-3)
        train(model, optimizer, step, step + 1)
        scheduler.step()
    assert rates == pytest.approx([0.25] * 3 + [0.5] * 3 + [1.0] * 3)


def test_one_group_is_full_fine_tuning() -> None:
    """To the last bit, where rounding draws no random numbers."""
    found = []
    for method in (TimestepExperts(groups=1, overlap=0.0), FullFineTune()):
        model = small_flow()
        optimizer = attach(model, method, lr=3e-3, rounding="nearest", keep_logits=True)
        times = Intervals.make(1)
        for step in range(4):
            noise, data, label = examples(step)
            t = times.draw(0, 4, seed=0, step=step)
            (model(torch.lerp(noise, data, t[:, None]), t, label) - (data - noise)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(weights(model))
    assert_same(*found)


def test_identical_groups_are_the_dense_model_of_one_group() -> None:
    """Bit for bit at every time: an evaluation runs one group's two blocks and nothing else."""
    model, optimizer = start(THREE)
    train(model, optimizer, 0, 3)
    dense = small_flow(layers=2)
    own = {name: value for name, value in model.state_dict().items() if not name.startswith("blocks.")}
    first = {name: value for name, value in model.state_dict().items() if name.startswith(("blocks.0.", "blocks.1."))}
    dense.load_state_dict({**own, **first})
    for number, block in enumerate(model.blocks):
        block.load_state_dict(model.blocks[number % 2].state_dict())
    model.eval()
    noise, _, label = examples(0)
    for t in (0.0, 0.3, 0.5, 0.9, 1.0):
        assert torch.equal(model(noise, torch.full((4,), t), label), dense(noise, torch.full((4,), t), label))


VARIANTS: dict[str, tuple[TimestepExperts, str | None]] = {
    "kept": (TimestepExperts(groups=3, retired_state="keep"), None),
    "paged": (TimestepExperts(groups=3), None),
    "weights too": (TimestepExperts(groups=3, resting_weights="page"), None),
    "weights only": (TimestepExperts(groups=3, retired_state="keep", resting_weights="page"), None),
    "windows": (TimestepExperts(groups=3, resting_weights="page"), "host"),
    "files": (TimestepExperts(groups=3, resting_weights="page"), "file"),
}


def place(paging: str | None, folder: Path) -> str | None:
    return f"file:{folder / 'pages'}" if paging == "file" else paging


def moments(optimizer: Any) -> dict[str, Any]:
    return through_disk({key: optimizer.state_dict()[key] for key in ("state", "counters")})  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def kept() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and moments of a run that has everything on the device."""
    model, optimizer = start(VARIANTS["kept"][0])
    train(model, optimizer, 0, 7)
    return weights(model), moments(optimizer)


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "kept"])
def test_what_is_paged_is_bit_equal_to_what_is_kept(name: str, kept: Any, tmp_path: Path) -> None:
    """Weights and moments, while attached and after; plain values only are left."""
    method, paging = VARIANTS[name]
    model, optimizer = start(method, paging=place(paging, tmp_path))
    train(model, optimizer, 0, 7)
    assert_same(weights(model), kept[0])
    assert_same(moments(optimizer), kept[1])
    optimizer.detach()
    assert_same(weights(model), kept[0])
    assert all(param.requires_grad and not param.isnan().any() for param in model.parameters())


@pytest.mark.parametrize("name", VARIANTS)
def test_a_resumed_run_is_bit_equal(name: str, kept: Any, tmp_path: Path) -> None:
    """Stopped in the middle of a cycle, loaded into a fresh model with another seed; times go on as they would have."""
    method, paging = VARIANTS[name]
    stopped, before = start(method, paging=place(paging, tmp_path / "one"))
    train(stopped, before, 0, 4)
    saved = through_disk({"model": stopped.state_dict(), "optimizer": before.state_dict()})
    model, optimizer = start(method, seed=8, paging=place(paging, tmp_path / "other"))
    train(model, optimizer, 20, 21)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    assert optimizer.active_group == 1
    train(model, optimizer, 4, 7)
    assert_same(weights(model), kept[0])
    assert_same(moments(optimizer), kept[1])


def _train_until_killed(folder: Path) -> None:
    """Save after each step, and die in the fifth step's backward."""
    torch.set_num_threads(1)
    model, optimizer = start(VARIANTS["files"][0], paging=place("file", folder))

    def die(_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    for step in range(7):
        if step == 4:
            model.head.weight.register_hook(die)
        train(model, optimizer, step, step + 1)
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / "partial")
        (folder / "partial").replace(folder / "state.pt")


def test_a_killed_run_goes_on_bit_equal(kept: Any, tmp_path: Path) -> None:
    """SIGKILL while pages are in files, those of the killed process left behind."""
    child = multiprocessing.get_context("fork").Process(target=_train_until_killed, args=(tmp_path,))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    model, optimizer = start(VARIANTS["files"][0], paging=place("file", tmp_path))
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    train(model, optimizer, 4, 7)
    assert_same(weights(model), kept[0])
    assert_same(moments(optimizer), kept[1])


def test_what_several_blocks_share_is_shared() -> None:
    """A module that all blocks have steps each time, whichever group is active, and never rests."""
    model = small_flow()
    for block in model.blocks:
        block.norm = model.blocks[0].norm  # type: ignore[assignment, union-attr]
    optimizer = attach(model, TimestepExperts(groups=3, resting_weights="page"), lr=3e-3)
    for step in range(2):
        before = model.blocks[0].norm.weight.clone()  # type: ignore[union-attr, operator]
        train(model, optimizer, step, step + 1)  # type: ignore[arg-type]
        assert not torch.equal(before, model.blocks[0].norm.weight)  # type: ignore[union-attr, arg-type]


def test_a_frozen_model_beside_the_blocks_is_left_alone(recwarn: pytest.WarningsRecorder) -> None:
    """An encoder that was frozen is no oversight: nothing is said, and it does not move."""
    model = small_flow()
    model.label.requires_grad_(False)
    optimizer = attach(model, THREE, lr=3e-3)
    before = weights(model)
    train(model, optimizer, 0, 1)  # type: ignore[arg-type]
    assert changed(model, before) == {"embed", "time", "head", "blocks.0", "blocks.1"}
    assert not [warning for warning in recwarn.list if issubclass(warning.category, UserWarning)]


def test_a_block_that_is_frozen_whole_is_refused() -> None:
    """Groups would be of another size; the model is as it was."""
    model = small_flow()
    model.blocks[3].requires_grad_(False)
    with pytest.raises(InputError, match=r"5 layers do not divide|blocks\.3 is frozen whole"):
        attach(model, THREE)
    model.blocks[2].requires_grad_(False)
    model.blocks[4].requires_grad_(False)
    with pytest.raises(InputError, match=r"blocks\.2 is frozen whole"):
        attach(model, THREE)
    assert type(model.blocks) is nn.ModuleList


def test_the_users_own_times_are_refused_in_training() -> None:
    """Drawn from all of [0, 1], they would train an expert on everything."""
    model, _ = start(THREE)
    noise, _, label = examples(0, rows=16)
    with pytest.raises(InputError, match=r"times\(batch_size\)"):
        model(noise, torch.linspace(0, 1, 16), label)


def test_a_detached_model_runs_by_its_route() -> None:
    """In evaluation and in training by time, for the experts are what was trained; the optimizer is done."""
    model, optimizer = start(THREE)
    train(model, optimizer, 0, 3)
    optimizer.detach()
    ran = [block.runs for block in model.blocks]  # type: ignore[union-attr]
    noise, _, label = examples(0)
    model(noise, torch.full((4,), 0.5), label)
    assert [block.runs - was for block, was in zip(model.blocks, ran)] == [0, 0, 1, 1, 0, 0]  # type: ignore[operator]
    with pytest.raises(InputError, match="detached"):
        optimizer.times(4)
    assert isinstance(attach(model, THREE), type(optimizer))


class RoutedFlow(SmallFlow):
    """A model whose forward asks a route of its own."""

    def __init__(self, route: Route) -> None:
        super().__init__(route.layers)
        self.route = route

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        time = self.time(t.reshape(-1, 1)) + self.label(label)
        hidden = self.embed(x)
        for number in self.route.blocks_of(self.route.choose(t, self.training)):
            hidden = self.blocks[number](hidden, time)
        velocity: Tensor = self.head(hidden)
        return velocity


@pytest.mark.parametrize("resting_weights", ["keep", "page"])
def test_a_model_with_a_route_of_its_own_trains_alike(resting_weights: str, kept: Any) -> None:
    """Bit for bit what a routed list gives; the model's route is what the optimizer sets."""
    torch.manual_seed(0)
    model = RoutedFlow(Route(6, Intervals.make(3, "uniform")))
    optimizer: Any = attach(model, TimestepExperts(groups=3, resting_weights=resting_weights), lr=3e-3, seed=3)
    train(model, optimizer, 0, 7)
    assert type(model.blocks) is nn.ModuleList
    assert optimizer.route is model.route
    assert_same(weights(model), kept[0])
    model.eval()
    noise, _, label = examples(0)
    assert not any(model(noise, torch.full((4,), t), label).isnan().any() for t in (0.1, 0.5, 0.9))
    optimizer.detach()
    assert model.route.active is None


def test_a_route_with_other_boundaries_is_refused() -> None:
    """What the model learnt by is not what the method would train by."""
    model = RoutedFlow(Route(6, Intervals.make(3, "uniform")))
    with pytest.raises(InputError, match="the model's groups have the boundaries"):
        attach(model, TimestepExperts(groups=3, times="logit-normal"))
