"""`AdamW8bit` is a whole torch optimizer: what any loop, scheduler, scaler or checkpoint expects of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tolerances import ADAMW_100_STEPS, CODEC_SCALING, CODEC_STOCHASTIC
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR

from lisa_kernels.optim import AdamW8bit

from .steps import LR, normal, parameters, run, saved_and_loaded, set_gradients

# The step


def test_small_tensors_follow_torchs_adamw_for_100_steps(device: torch.device) -> None:
    ours, theirs = parameters(device=device)[1:], parameters(device=device)[1:]
    optimizer = AdamW8bit(ours, lr=LR, weight_decay=0.1)
    reference = torch.optim.AdamW(theirs, lr=LR, weight_decay=0.1)
    run(optimizer, ours, range(100))
    run(reference, theirs, range(100))
    for one, other in zip(ours, theirs):
        assert float((one - other).detach().abs().max()) <= ADAMW_100_STEPS


def test_an_8_bit_matrix_stays_near_torchs_adamw() -> None:
    ours, theirs = parameters()[:1], parameters()[:1]
    start = ours[0].detach().clone()
    run(AdamW8bit(ours, lr=LR), ours, range(100))
    run(torch.optim.AdamW(theirs, lr=LR), theirs, range(100))
    moved, wanted = ours[0].detach() - start, theirs[0].detach() - start
    assert float((moved - wanted).norm() / wanted.norm()) < CODEC_STOCHASTIC


def test_states_have_the_promised_form_and_size() -> None:
    params = [nn.Parameter(torch.zeros(256, 1024)), *parameters()[1:]]
    optimizer = AdamW8bit(params)
    run(optimizer, params, range(1))
    big, small, vector = (optimizer.state[param] for param in params)
    assert {name: tensor.dtype for name, tensor in big.items()} == {
        "step": torch.int64, "m_codes": torch.uint8, "m_absmax": torch.float32,
        "v_codes": torch.uint8, "v_absmax": torch.float32,
    }  # fmt: skip
    state_bytes = sum(tensor.numel() * tensor.element_size() for tensor in big.values())
    assert state_bytes / params[0].numel() == pytest.approx(2.03, abs=0.005)
    for state in (small, vector):
        assert {name: tensor.dtype for name, tensor in state.items()} == {
            "step": torch.int64, "m": torch.float32, "v": torch.float32,
        }  # fmt: skip


@pytest.mark.parametrize(
    "shape",
    [(4096,), ((1 << 20) - 1,), (1 << 20,), (63, 65), (64, 64)],
    ids=["vector", "longest-vector", "matrices-laid-flat", "one-below", "at-the-limit"],
)
def test_vectors_and_small_matrices_keep_32_bits(shape: tuple[int, ...]) -> None:
    param = nn.Parameter(torch.zeros(shape))
    optimizer = AdamW8bit([param])
    run(optimizer, [param], range(1))
    assert ("m_codes" in optimizer.state[param]) is (shape in ((64, 64), (1 << 20,)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weights_of_every_dtype_move_towards_a_minimum(dtype: torch.dtype, device: torch.device) -> None:
    params = parameters(dtype, device)
    optimizer = AdamW8bit(params, lr=0.05, weight_decay=0.0)
    before = [float(param.detach().float().norm()) for param in params]
    for _ in range(100):
        optimizer.zero_grad()
        sum(param.float().square().sum() for param in params).backward()  # type: ignore[union-attr]
        optimizer.step()
    assert all(param.dtype == dtype for param in params)
    assert all(float(param.detach().float().norm()) < 0.1 * start for param, start in zip(params, before))


def test_bfloat16_weights_with_float32_gradients_are_stepped() -> None:
    param = nn.Parameter(normal(64, 64, dtype=torch.bfloat16))
    before = param.detach().clone()
    param.grad_dtype = torch.float32
    param.grad = normal(64, 64, seed=1)
    AdamW8bit([param], lr=LR).step()
    assert not torch.equal(param, before)


@pytest.mark.parametrize("shape", [(64, 80), (7, 9)], ids=["8-bit", "32-bit"])
def test_strided_parameters_and_gradients_step_as_contiguous_ones(shape: tuple[int, int]) -> None:
    plain, strided = nn.Parameter(normal(*shape)), nn.Parameter(normal(*shape).t().contiguous().t())
    assert not strided.is_contiguous()
    optimizers = AdamW8bit([plain], lr=LR), AdamW8bit([strided], lr=LR)
    for step in range(3):
        plain.grad = normal(*shape, seed=step)
        strided.grad = normal(*shape, seed=step).t().contiguous().t()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(plain, strided)
    assert strided.stride() == (1, shape[0])
    assert torch.equal(optimizers[0].moments(plain)[0], optimizers[1].moments(strided)[0])


def test_empty_parameters_scalars_and_missing_gradients_are_stepped_over() -> None:
    empty, scalar, frozen = (
        nn.Parameter(torch.zeros(0, 5)),
        nn.Parameter(torch.tensor(1.0)),
        nn.Parameter(torch.ones(3)),
    )
    optimizer = AdamW8bit([empty, scalar, frozen], lr=LR)
    empty.grad, scalar.grad = torch.zeros(0, 5), torch.tensor(1.0)
    optimizer.step()
    assert float(scalar.detach()) < 1.0
    assert torch.equal(frozen, torch.ones(3))
    assert list(optimizer.state) == [scalar]
    assert saved_and_loaded(optimizer.state_dict())["state"].keys() == {1}


def test_a_step_without_any_gradient_is_no_step() -> None:
    optimizer = AdamW8bit(parameters())
    optimizer.step()
    assert (optimizer.steps, optimizer.skipped_steps) == (0, 0)


def test_groups_keep_their_own_hyper_parameters() -> None:
    params = parameters()
    optimizer = AdamW8bit([{"params": [params[0]]}, {"params": params[1:], "lr": 0.0, "weight_decay": 0.5}], lr=LR)
    before = [param.detach().clone() for param in params]
    run(optimizer, params, range(1))
    assert not torch.equal(params[0], before[0])
    assert all(torch.equal(param, old) for param, old in zip(params[1:], before[1:]))
    assert [group["lr"] for group in optimizer.param_groups] == [LR, 0.0]


def test_an_added_group_takes_the_next_indices_and_trains() -> None:
    params = parameters()
    optimizer = AdamW8bit(params[:1], lr=LR)
    run(optimizer, params[:1], range(2))
    optimizer.add_param_group({"params": iter(params[1:]), "lr": 0.1})
    assert [optimizer.index_of(param) for param in params] == [0, 1, 2]
    before = params[1].detach().clone()
    run(optimizer, params, range(2, 3))
    assert not torch.equal(params[1], before)
    assert [int(optimizer.state[param]["step"]) for param in params] == [3, 1, 1]


def test_named_parameters_are_accepted_and_their_names_saved() -> None:
    model = nn.Linear(80, 64)
    optimizer = AdamW8bit(model.named_parameters(), lr=LR)
    model(normal(3, 80)).sum().backward()
    optimizer.step()
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]


def test_a_closure_runs_with_gradients_enabled_and_its_loss_is_returned() -> None:
    param = nn.Parameter(torch.ones(5))
    optimizer = AdamW8bit([param], lr=LR)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert float(optimizer.step(closure)) == 5.0
    assert float(param.detach().max()) < 1.0


def test_step_hooks_run_once_each_also_beside_a_subclass() -> None:
    """torch wraps the `step` of every class it meets; a subclass takes `_take_step` and not `super().step()`."""

    class Subclass(AdamW8bit):
        def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
            self._take_step()

    for kind in (AdamW8bit, Subclass):
        params, calls = parameters(), []
        optimizer = kind(params)
        optimizer.register_step_pre_hook(lambda *_, calls=calls: calls.append("before"))
        optimizer.register_step_post_hook(lambda *_, calls=calls: calls.append("after"))
        run(optimizer, params, range(1))
        assert calls == ["before", "after"]
        assert optimizer.steps == 1


def test_zero_grad_drops_or_clears_the_gradients() -> None:
    params = parameters()
    optimizer = AdamW8bit(params)
    set_gradients(params, 0)
    optimizer.zero_grad(set_to_none=False)
    assert all(float(param.grad.abs().sum()) == 0 for param in params if param.grad is not None)
    optimizer.zero_grad()
    assert all(param.grad is None for param in params)


def test_changing_hyper_parameters_between_steps_takes_effect() -> None:
    params = parameters()
    optimizer = AdamW8bit(params, lr=LR)
    run(optimizer, params, range(1))
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = 0, 0
    before = [param.detach().clone() for param in params]
    run(optimizer, params, range(1, 2))
    assert all(torch.equal(param, old) for param, old in zip(params, before))


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda opt: LambdaLR(opt, lambda step: 0.5**step), id="lambda"),
        pytest.param(lambda opt: CosineAnnealingLR(opt, T_max=10), id="cosine"),
        pytest.param(lambda opt: OneCycleLR(opt, max_lr=0.1, total_steps=10), id="one-cycle-with-momentum"),
    ],
)
def test_schedulers_drive_it_as_they_drive_torchs_adamw(make: Callable[[torch.optim.Optimizer], Any]) -> None:
    ours, theirs = parameters()[1:], parameters()[1:]
    pairs = [(AdamW8bit(ours, lr=LR), ours), (torch.optim.AdamW(theirs, lr=LR), theirs)]
    for optimizer, params in pairs:
        scheduler = make(optimizer)
        for step in range(6):
            set_gradients(params, step)
            optimizer.step()
            scheduler.step()
    assert pairs[0][0].param_groups[0]["lr"] == pairs[1][0].param_groups[0]["lr"]
    assert all(float((a - b).detach().abs().max()) <= ADAMW_100_STEPS for a, b in zip(ours, theirs))


# Moments from outside


@pytest.mark.parametrize("where", [0, 1], ids=["8-bit", "32-bit"])
def test_moments_can_be_read_and_replaced(where: int) -> None:
    params = parameters()
    optimizer = AdamW8bit(params)
    run(optimizer, params, range(2))
    m, v = (tensor * 2 for tensor in optimizer.moments(params[where]))
    assert m.shape == v.shape == params[where].shape
    optimizer.set_moments(params[where], m, v)
    for given, wanted in zip(optimizer.moments(params[where]), (m, v)):
        # Doubling moves no code; the scale is found again from decoded values, a rounding or two away.
        assert torch.allclose(given, wanted, rtol=CODEC_STOCHASTIC + CODEC_SCALING if where == 0 else 0, atol=0)


def test_retired_parameters_free_their_state_and_start_afresh() -> None:
    params = parameters()
    optimizer = AdamW8bit(params)
    run(optimizer, params, range(3))
    optimizer.retire(params[:1])
    assert params[0] not in optimizer.state
    run(optimizer, params, range(3, 4))
    assert [int(optimizer.state[param]["step"]) for param in params] == [1, 4, 4]


def test_a_state_that_was_only_looked_at_is_still_made() -> None:
    """`optimizer.state` is a defaultdict: reading an entry leaves an empty one."""
    params = parameters()
    optimizer = AdamW8bit(params)
    assert optimizer.state[params[0]] == {}
    run(optimizer, params, range(1))
    assert "m_codes" in optimizer.state[params[0]]
