"""`GaLoreAdamW8bit` is Adam on a projection of the gradient, and a torch optimizer in everything else."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optim.steps import LR, assert_same, normal, tensors_of
from tolerances import CODEC_STOCHASTIC
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.lr_scheduler import CosineAnnealingLR

from lisa_kernels import AdamW8bit, GaLoreAdamW8bit
from lisa_kernels.methods import galore_adamw, projection
from lisa_kernels.methods.projection import SIDES, Projection

from .galore_cases import RANK, gradient, group, matrix, mixed, run

SHAPES = {"tall": (48, 32), "wide": (32, 48), "square": (40, 40)}
TYPES = list(SIDES)
# Ten steps in float32 against float64, relative to the way gone; Adam divides, which adds a digit to rounding errors.
FLOAT32_STEPS = 1e-4
# The same where moments have one byte each.
EIGHT_BIT_STEPS = CODEC_STOCHASTIC


def float64_adam(
    start: Tensor, gradients: list[Tensor], bases: dict[str, Tensor], lr: float, decay: float, scale: float, eps: float
) -> Tensor:
    """Return the weight after AdamW's steps on Q G Pᵀ, lifted by Qᵀ · P and times `scale`; a missing basis is none."""
    weight = start.double()
    left = bases.get("left_basis", torch.eye(start.shape[0])).double()
    right = bases.get("right_basis", torch.eye(start.shape[1])).double()
    m = v = torch.zeros(len(left), len(right), dtype=torch.float64)
    for t, grad in enumerate(gradients, 1):
        low = left @ grad.double() @ right.t()
        m, v = 0.9 * m + 0.1 * low, 0.999 * v + 0.001 * low * low
        update = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + eps)
        weight = (1 - lr * decay) * weight - lr * scale * (left.t() @ update @ right)
    return weight


# The step


@pytest.mark.parametrize("proj_type", TYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("whole", [False, True], ids=["rank-4", "whole-rank"])
def test_ten_steps_are_adam_in_the_basis(shape: tuple[int, int], proj_type: str, whole: bool) -> None:
    """At rank 4, and at the whole rank, where it is Adam on all of the gradient in a turned space."""
    rank, decay, scale, eps = min(shape) if whole else RANK, 0.1, 0.5, 1e-3
    weight = matrix(*shape)
    start, gradients = weight.detach().clone(), [gradient(shape, step) for step in range(10)]
    optimizer = GaLoreAdamW8bit(
        [group(weight, rank=rank, proj_type=proj_type, scale=scale)], lr=LR, weight_decay=decay, eps=eps,
        rounding="nearest",
    )  # fmt: skip
    for grad in gradients:
        weight.grad = grad
        optimizer.step()
    bases = {name: basis for name, basis in optimizer.state[weight].items() if name.endswith("basis")}
    wanted = float64_adam(start, gradients, bases, LR, decay, scale, eps)
    way = float((wanted - start).norm())
    assert float((weight.detach() - wanted).norm()) < FLOAT32_STEPS * way
    other = float64_adam(start, gradients, {}, LR, decay, scale, eps)
    assert float((weight.detach() - other).norm()) > 0.3 * way


@pytest.mark.parametrize("proj_type", TYPES)
@pytest.mark.parametrize("shape", [(128, 96), (96, 128)], ids=["tall", "wide"])
def test_ten_steps_in_8_bits_stay_near_adam_in_the_basis(shape: tuple[int, int], proj_type: str) -> None:
    weight = matrix(*shape)
    start, gradients = weight.detach().clone(), [gradient(shape, step) for step in range(10)]
    optimizer = GaLoreAdamW8bit([group(weight, rank=64, proj_type=proj_type)], lr=LR, weight_decay=0.0, eps=1e-3)
    for grad in gradients:
        weight.grad = grad
        optimizer.step()
    assert "m_codes" in optimizer.state[weight]
    bases = {name: basis for name, basis in optimizer.state[weight].items() if name.endswith("basis")}
    wanted = float64_adam(start, gradients, bases, LR, 0.0, 0.25, 1e-3)
    assert float((weight.detach() - wanted).norm() / (wanted - start).norm()) < EIGHT_BIT_STEPS


@pytest.mark.parametrize("proj_type", TYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_steps_are_those_of_galore_torch(shape: tuple[int, int], proj_type: str) -> None:
    """Run side by side, from exact SVDs there and range finders here; both bases are of the first gradient.

    The first step is at a rate of 0: in "full" the projection of the gradient that chose both bases is diagonal, and
    Adam makes what rounding left beside the diagonal as large as the rest.
    """
    peer = pytest.importorskip("galore_torch", reason="galore-torch is not installed")
    settings = {"rank": RANK, "update_proj_gap": 200, "scale": 0.25, "proj_type": proj_type}
    ends = []
    for kind in (peer.GaLoreAdamW, GaLoreAdamW8bit):
        weight = matrix(*shape)
        optimizer = kind([{"params": [weight], **settings}], lr=0.0, weight_decay=0.1, eps=1e-10)
        for step in range(10):
            weight.grad = gradient(shape, step)
            optimizer.step()
            optimizer.param_groups[0]["lr"] = LR
        ends.append(weight.detach() - matrix(*shape).detach())
    # Theirs decays after the update: lr² · wd of the update.
    assert float((ends[0] - ends[1]).norm() / ends[0].norm()) < 2e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_regression_is_learnt_as_torchs_adamw_does(dtype: torch.dtype) -> None:
    inputs, teacher = normal(256, 48, seed=5), normal(32, 4, seed=6) @ normal(4, 48, seed=7) / 4
    targets = inputs @ teacher.t()

    def final_loss(make: Callable[[nn.Parameter], torch.optim.Optimizer], kind: torch.dtype) -> float:
        weight = nn.Parameter(torch.zeros(32, 48, dtype=kind))
        optimizer = make(weight)
        schedule = CosineAnnealingLR(optimizer, 200)
        for _ in range(200):
            optimizer.zero_grad()
            loss = (inputs @ weight.float().t() - targets).square().mean()
            loss.backward()
            optimizer.step()
            schedule.step()
        return float(loss.detach())

    theirs = final_loss(lambda weight: torch.optim.AdamW([weight], lr=0.06, weight_decay=0.0), torch.float32)
    ours = final_loss(
        lambda weight: GaLoreAdamW8bit(
            [group(weight, rank=8, scale=1.0, update_proj_gap=20)], lr=0.06, weight_decay=0.0
        ),
        dtype,
    )
    start = float(targets.square().mean())
    assert theirs < 1e-3 * start
    # Over seeds of the bases ours ends at 0.3e-3 to 1.2e-3 in every dtype.
    assert ours < 2e-3 * start


def test_four_micro_batches_step_as_one_batch() -> None:
    inputs, targets = normal(64, 32, seed=3), normal(64, 48, seed=4)
    ends = []
    for parts in (1, 4):
        weight = matrix(48, 32)
        optimizer = GaLoreAdamW8bit([group(weight, rank=8, update_proj_gap=2)], lr=LR, eps=1e-3)
        for _ in range(5):
            optimizer.zero_grad()
            for x, y in zip(inputs.chunk(parts), targets.chunk(parts)):
                ((x @ weight.t() - y).square().mean() / parts).backward()
            optimizer.step()
        ends.append(weight.detach())
    way = float((ends[0] - matrix(48, 32).detach()).norm())
    assert float((ends[0] - ends[1]).norm()) < FLOAT32_STEPS * way


def test_groups_without_a_rank_step_as_adamw8bit() -> None:
    """Bit for bit, beside projected ones."""
    params, groups = mixed()
    twins = [nn.Parameter(param.detach().clone()) for param in params]
    # The same places in the groups: they key the random numbers.
    plain = AdamW8bit(
        [{"params": twins[:2]}, {"params": twins[3:], "weight_decay": 0.0}, {"params": [twins[2]]}], lr=LR
    )
    run(GaLoreAdamW8bit(groups, lr=LR), params, range(4))
    run(plain, twins, range(4))
    assert all(torch.equal(params[i], twins[i]) for i in (3, 4))
    assert not any(torch.equal(params[i], twins[i]) for i in (0, 1, 2))


def test_how_many_matrices_are_stepped_at_a_time_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizers = []
    for elements in (galore_adamw.PORTION_ELEMENTS, 1000):
        monkeypatch.setattr(galore_adamw, "PORTION_ELEMENTS", elements)
        params, groups = mixed(torch.bfloat16)
        optimizers.append(GaLoreAdamW8bit(groups, lr=LR))
        run(optimizers[-1], params, range(4))
    assert_same(*optimizers)


def test_strided_weights_and_gradients_step_as_contiguous_ones() -> None:
    plain, strided = matrix(48, 32), nn.Parameter(normal(48, 32).t().contiguous().t())
    for weight in (plain, strided):
        optimizer = GaLoreAdamW8bit([group(weight, rank=8)], lr=LR)
        for step in range(3):
            grad = gradient((48, 32), step)
            weight.grad = grad if weight is plain else grad.t().contiguous().t()
            optimizer.step()
    assert torch.allclose(plain, strided, atol=1e-5)
    assert strided.stride() == (1, 48)


def test_clipping_is_by_the_norm_of_the_full_gradients() -> None:
    ends = []
    for limit in (0.5, None):
        params, groups = mixed()
        optimizer = GaLoreAdamW8bit(groups, lr=LR, eps=1e-3, max_grad_norm=limit)
        for index, param in enumerate(params):
            param.grad = normal(*param.shape, seed=index)
        norm = torch.nn.utils.get_total_norm([param.grad for param in params if param.grad is not None])
        if limit is None:
            torch.nn.utils.clip_grad_norm_(params, 0.5)
        else:
            assert optimizer.last_grad_norm is None
        optimizer.step()
        if limit is not None:
            assert float(optimizer.last_grad_norm) == pytest.approx(float(norm), rel=1e-5)  # type: ignore[arg-type]
        ends.append([param.detach() for param in params])
    assert all(torch.allclose(one, other, rtol=0, atol=LR * 1e-2) for one, other in zip(*ends))


def test_scaled_gradients_step_as_plain_ones() -> None:
    """As GradScaler leaves them: times a power of two, which the step takes out again."""
    ends = []
    for scale in (1.0, 1024.0):
        params, groups = mixed()
        optimizer = GaLoreAdamW8bit(groups, lr=LR)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.zeros(1)
        for step in range(4):
            for index, param in enumerate(params):
                param.grad = normal(*param.shape, seed=100 * step + index) * scale
            optimizer.step()
        ends.append([param.detach() for param in params])
    assert all(torch.equal(one, other) for one, other in zip(*ends))


def test_a_learning_rate_in_a_tensor_steps_as_the_number() -> None:
    optimizers = []
    for lr in (1e-2, torch.tensor(1e-2, dtype=torch.float64)):
        params, groups = mixed(torch.bfloat16)
        optimizers.append(GaLoreAdamW8bit(groups, lr=lr))  # type: ignore[arg-type]
        run(optimizers[-1], params, range(3))
    assert_same(*optimizers)


def test_a_step_is_seen_by_autograd() -> None:
    """A weight that changed since it was saved for a backward pass is found out."""
    weight = matrix(48, 32)
    optimizer = GaLoreAdamW8bit([group(weight)], lr=LR)
    loss = weight.square().sum()
    weight.grad = gradient((48, 32))
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_only_first_bases_are_asked_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake tensors have no values to read: with first bases made unasked, steps and refreshes run on them."""

    def unasked(self: GaLoreAdamW8bit, moving: list[Any], grad_scale: Tensor) -> bool:
        for each in moving:
            self._refresh(each, grad_scale)
        return True

    with FakeTensorMode():
        weight = matrix(48, 32)
        optimizer = GaLoreAdamW8bit([group(weight)])
        with pytest.raises(Exception, match=r"(?i)data-dependent|_local_scalar_dense"):
            run(optimizer, [weight], range(1))
    monkeypatch.setattr(GaLoreAdamW8bit, "_make_first", unasked)
    with FakeTensorMode():
        weights = [nn.Parameter(torch.zeros(96, 64, dtype=torch.bfloat16)) for _ in range(2)]
        optimizer = GaLoreAdamW8bit(
            [group(weights[0], rank=48, update_proj_gap=1), group(weights[1], proj_type="full", update_proj_gap=1)],
            max_grad_norm=1.0,
        )
        for _ in range(3):
            for weight in weights:
                weight.grad = torch.zeros_like(weight)
            optimizer.step()


def test_the_state_has_the_size_of_the_projection() -> None:
    weight = matrix(256, 128, dtype=torch.bfloat16)
    optimizer = GaLoreAdamW8bit([group(weight, rank=16)])
    run(optimizer, [weight], range(2))
    state = optimizer.state[weight]
    assert {name: (tuple(value.shape), value.dtype) for name, value in state.items()} == {
        "step": ((), torch.int64), "m_codes": ((4096,), torch.uint8), "m_absmax": ((16,), torch.float32),
        "v_codes": ((4096,), torch.uint8), "v_absmax": ((16,), torch.float32),
        "right_basis": ((16, 128), torch.bfloat16),
    }  # fmt: skip
    assert [moment.shape for moment in optimizer.moments(weight)] == [(16, 256), (16, 256)]


# Bases over time


def test_moments_are_carried_into_a_new_basis(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the gradient's directions turn, a run that leaves its moments in the old basis goes another way."""
    ends = []
    for transported in (True, False):
        if not transported:
            monkeypatch.setattr(projection, "transport_moments", lambda m, v, *_: (m, v))
        weight = matrix(48, 32)
        optimizer = GaLoreAdamW8bit([group(weight, update_proj_gap=2)], lr=LR)
        for step in range(6):
            weight.grad = normal(48, 32, seed=step)
            optimizer.step()
        ends.append(weight.detach())
    way = float((ends[0] - matrix(48, 32).detach()).norm())
    assert float((ends[0] - ends[1]).norm()) > 0.05 * way


def test_a_basis_follows_the_gradients() -> None:
    weight = matrix(48, 32)
    optimizer = GaLoreAdamW8bit([group(weight, update_proj_gap=4)], lr=LR)
    captured = []
    for step in range(12):
        # After six steps the gradients come from elsewhere.
        space = torch.linalg.qr(normal(32, RANK, seed=50 + (step >= 6)))[0]
        weight.grad = normal(48, RANK, seed=step) @ space.t() + 1e-3 * normal(48, 32, seed=100 + step)
        optimizer.step()
        captured.append(float((optimizer.state[weight]["right_basis"] @ space).norm()) ** 2 / RANK)
    assert captured[5] > 0.99
    assert captured[6] < 0.5
    assert captured[11] > 0.99


def test_refreshes_of_many_matrices_are_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first step, which makes all bases, each step refreshes one of eight matrices, or none."""
    refreshed: list[int] = []
    inner = Projection.refresh

    def counted(self: Projection, *args: Any) -> bool:
        refreshed[-1] += 1
        return inner(self, *args)

    monkeypatch.setattr(Projection, "refresh", counted)
    weights = [matrix(16, 12, seed=i) for i in range(8)]
    optimizer = GaLoreAdamW8bit([group(weight, update_proj_gap=16) for weight in weights], lr=LR)
    for step in range(48):
        refreshed.append(0)
        run(optimizer, weights, range(step, step + 1))
    assert refreshed[0] == 8
    assert max(refreshed[1:]) == 1
    assert sum(refreshed[16:]) == 16


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e18], ids=str)
@pytest.mark.parametrize("where", [0, 1, 3], ids=["std", "full", "plain"])
def test_a_skipped_step_changes_nothing(where: int, bad: float) -> None:
    """Not even where every basis is due, as here at every step; the next good step moves them on."""
    params, groups = mixed(torch.bfloat16)
    optimizer = GaLoreAdamW8bit([{**each, "update_proj_gap": 1} if "rank" in each else each for each in groups])
    run(optimizer, params, range(3))
    before = [tensor.clone() for tensor in tensors_of(optimizer)]
    for index, param in enumerate(params):
        param.grad = normal(*param.shape, seed=index, dtype=param.dtype)
    params[where].grad[2, 3] = bad  # type: ignore[index]
    optimizer.step()
    assert (optimizer.steps, optimizer.skipped_steps) == (3, 1)
    assert all(torch.equal(tensor, old) for tensor, old in zip(tensors_of(optimizer), before))
    run(optimizer, params, range(3, 4))
    assert not any(torch.equal(tensor, old) for tensor, old in zip(tensors_of(optimizer), before))


def test_a_skipped_first_step_makes_no_basis_and_the_next_one_does() -> None:
    """The run is bit for bit that of one which never saw the skipped step."""
    ends = []
    for first in (True, False):
        weights = [matrix(48, 32), matrix(64, 80, seed=1)]
        optimizer = GaLoreAdamW8bit([group(weights[0]), {"params": weights[1:]}], lr=LR)
        if first:
            weights[0].grad, weights[1].grad = gradient((48, 32)), torch.full((64, 80), math.nan)
            optimizer.step()
            assert not optimizer.state
        run(optimizer, weights, range(3))
        ends.append(tensors_of(optimizer))
    assert all(torch.equal(one, other) for one, other in zip(*ends))


def test_a_matrix_whose_first_gradient_is_zero_gets_its_basis_later() -> None:
    weight = matrix(48, 32)
    start = weight.detach().clone()
    optimizer = GaLoreAdamW8bit([group(weight)], lr=LR, weight_decay=0.0)
    for _ in range(3):
        weight.grad = torch.zeros(48, 32)
        optimizer.step()
    assert torch.equal(weight, start)
    weight.grad = gradient((48, 32))
    optimizer.step()
    exact = torch.linalg.svd(gradient((48, 32)))[2][:RANK]
    assert float((optimizer.state[weight]["right_basis"] @ exact.t()).norm()) ** 2 > 0.99 * RANK
    assert not torch.equal(weight, start)


def test_a_retired_matrix_begins_anew() -> None:
    params, groups = mixed()
    optimizer = GaLoreAdamW8bit(groups, lr=LR)
    run(optimizer, params, range(2))
    optimizer.retire(params)
    assert not optimizer.state
    run(optimizer, params, range(2, 4))
    assert float(optimizer.state[params[0]]["right_basis"].norm()) > 1
    assert int(optimizer.state[params[0]]["step"]) == 2
