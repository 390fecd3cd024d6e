"""Following a flow from noise to data."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torchdiffeq import odeint

from lisa_kernels import InputError
from lisa_kernels.flow import Intervals, Route
from lisa_kernels.flow.sample import guided, sample, time_grid

from .test_transformer import flow, inputs, runs


def curved(x: Tensor, t: Tensor, condition: Any) -> Tensor:
    """A velocity without a closed path."""
    return torch.sin(3 * x + 5 * t.to(x.dtype).reshape(-1, 1)) - x * condition


def at_time(x: Tensor, t: float) -> Tensor:
    return curved(x, torch.full((len(x),), float(t)), 0.7)


@pytest.mark.parametrize(("solver", "theirs"), [("euler", "euler"), ("heun", "heun2")])
def test_solvers_take_the_steps_of_torchdiffeq(solver: str, theirs: str) -> None:
    x = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    route = Route(8, Intervals.make(4, "uniform"))
    found = sample(curved, route, x, 0.7, steps=20, solver=solver)
    wanted = odeint(lambda t, y: at_time(y, float(t)), x, torch.linspace(0, 1, 21, dtype=torch.float64), method=theirs)
    # Times are handed to models in float32.
    torch.testing.assert_close(found, wanted[-1], rtol=0, atol=1e-6)
    other = sample(curved, route, x, 0.7, steps=20, solver="heun" if solver == "euler" else "euler")
    assert (other - wanted[-1]).abs().max() > 1e-4


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_more_steps_come_nearer_in_the_solver_s_order(solver: str, order: int) -> None:
    """Half the step, a half or a quarter of the error."""
    x = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    span = torch.tensor([0.0, 1.0], dtype=torch.float64)
    truth = odeint(lambda t, y: at_time(y, float(t)), x, span, rtol=1e-10, atol=1e-10)[-1]
    route = Route(8, Intervals.make(4, "uniform"))
    errors = [(sample(curved, route, x, 0.7, steps=n, solver=solver) - truth).norm() for n in (16, 32)]
    assert float(errors[0] / errors[1]) == pytest.approx(2**order, rel=0.25)


@pytest.mark.parametrize("bounds", [(0.0, 0.25, 0.5, 0.75, 1.0), (0.0, 0.1, 0.37, 0.9, 1.0)])
@pytest.mark.parametrize("steps", [4, 7, 40])
def test_steps_end_at_the_boundaries(bounds: tuple[float, ...], steps: int) -> None:
    """All of them are taken, at least one in each interval, and none reaches over a boundary."""
    grid = time_grid(Intervals(bounds), steps)
    assert [group for group, _ in grid] == [0, 1, 2, 3]
    assert [(times[0], times[-1]) for _, times in grid] == list(pairwise(bounds))
    assert sum(len(times) - 1 for _, times in grid) == steps
    assert all(low < high for _, times in grid for low, high in pairwise(times))


def test_fewer_steps_than_groups_are_refused() -> None:
    with pytest.raises(InputError, match="at least 4"):
        time_grid(Intervals.make(4), 3)
    with pytest.raises(InputError, match="did you mean 'euler'"):
        sample(curved, Route(4, Intervals.make(1)), torch.zeros(1, 4), 0.0, solver="eular")


@pytest.mark.parametrize(("solver", "evaluations"), [("euler", 1), ("heun", 2)])
def test_a_step_runs_its_own_group_alone(solver: str, evaluations: int) -> None:
    """Also Heun's second evaluation at the boundary, where the time is the next group's; guidance adds none."""
    model = flow()
    ran = runs(model)
    x, labels = inputs()
    told = list[float]()
    model.register_forward_pre_hook(lambda _, args: told.append(float(args[1][0])))
    anything = torch.full((3,), model.any_class)
    sample(guided(model, 2.0, anything), model.route, x, labels, steps=8, solver=solver)
    assert ran == [block for group in range(4) for _ in range(2 * evaluations) for block in (2 * group, 2 * group + 1)]
    assert (0.25 in told[: 2 * evaluations]) == (solver == "heun")
    assert model.route.held is None


def test_guidance_extrapolates_from_no_condition() -> None:
    """v(any) + strength · (v(label) − v(any)); a strength of 1 leaves the model as it is."""
    model = flow()
    x, labels = inputs()
    times, anything = torch.full((3,), 0.4), torch.full((3,), model.any_class)
    with torch.no_grad():
        free, wanted = model(x, times, anything), model(x, times, labels)
        found = guided(model, 3.0, anything)(x, times, labels)
    torch.testing.assert_close(found, free + 3 * (wanted - free), rtol=1e-4, atol=1e-5)
    assert guided(model, 1.0, anything) is model
