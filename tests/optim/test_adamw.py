"""`AdamW8bit` is a whole torch optimizer: what any loop, scheduler, scaler or checkpoint expects of one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tolerances import ADAMW_100_STEPS, CODEC_SCALING, CODEC_STOCHASTIC
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR
from torch.utils._python_dispatch import TorchDispatchMode

from lisa_kernels.errors import InputError
from lisa_kernels.optim import AdamW8bit

from .steps import LR, normal, parameters, run, saved_and_loaded, set_gradients, tensors_of


@pytest.fixture
def bfloat16_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


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


@pytest.mark.parametrize("shape", [(4096,), (63, 65), (64, 64)], ids=["vector", "one-below", "at-the-limit"])
def test_vectors_and_small_matrices_keep_32_bits(shape: tuple[int, ...]) -> None:
    param = nn.Parameter(torch.zeros(shape))
    optimizer = AdamW8bit([param])
    run(optimizer, [param], range(1))
    assert ("m_codes" in optimizer.state[param]) is (shape == (64, 64))


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


# Random numbers


def test_two_runs_of_one_seed_are_equal_and_of_another_differ() -> None:
    results = []
    for seed in (0, 0, 1):
        params = parameters(torch.bfloat16)
        run(AdamW8bit(params, seed=seed), params, range(3))
        results.append(params[0].detach())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_two_equal_parameters_are_rounded_differently() -> None:
    params = [nn.Parameter(normal(64, 80, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = AdamW8bit(params)
    for param in params:
        param.grad = normal(64, 80, seed=1, dtype=torch.bfloat16)
    optimizer.step()
    assert not torch.equal(*params)


def test_nearest_rounding_needs_no_random_numbers() -> None:
    results = []
    for seed in (0, 1):
        params = parameters(torch.bfloat16)
        run(AdamW8bit(params, seed=seed, rounding="nearest"), params, range(3))
        results.append(params[0].detach())
    assert torch.equal(*results)


def test_global_random_state_is_neither_used_nor_moved() -> None:
    params = parameters(torch.bfloat16)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    run(AdamW8bit(params), params, range(2))
    assert torch.equal(torch.get_rng_state(), before)


# Gradients that are not finite


@pytest.mark.parametrize(
    "bad", [math.nan, math.inf, -math.inf, 1e25], ids=["nan", "inf", "minus-inf", "square-overflows"]
)
@pytest.mark.parametrize("where", [0, 1, 2], ids=["8-bit", "small-matrix", "vector"])
def test_one_bad_gradient_skips_the_step_of_all_parameters(where: int, bad: float, device: torch.device) -> None:
    params = parameters(device=device)
    optimizer = AdamW8bit(params)
    run(optimizer, params, range(2))
    before = [tensor.clone() for tensor in tensors_of(optimizer)]
    set_gradients(params, 2)
    params[where].grad.view(-1)[3] = bad  # type: ignore[union-attr]
    optimizer.step()
    assert all(torch.equal(tensor, old) for tensor, old in zip(tensors_of(optimizer), before))
    assert (optimizer.steps, optimizer.skipped_steps) == (2, 1)
    assert bool(optimizer.last_skip(params[0].device))
    run(optimizer, params, range(3, 4))
    assert (optimizer.steps, optimizer.skipped_steps) == (3, 1)
    assert not bool(optimizer.last_skip(params[0].device))


def test_a_skipped_step_uses_no_random_numbers() -> None:
    """With and without a bad step in between, the following steps are the same."""
    results = []
    for bad_step in (False, True):
        params = parameters(torch.bfloat16)
        optimizer = AdamW8bit(params)
        run(optimizer, params, range(1))
        if bad_step:
            set_gradients(params, 9, scale=math.inf)
            optimizer.step()
        run(optimizer, params, range(1, 3))
        results.append([tensor.clone() for tensor in tensors_of(optimizer)])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_large_finite_gradients_are_taken() -> None:
    params = parameters()
    optimizer = AdamW8bit(params)
    set_gradients(params, 0, scale=1e17)
    optimizer.step()
    assert optimizer.skipped_steps == 0
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors_of(optimizer))


def scaled_run(params: list[nn.Parameter], inf_step: int | None, unscale: bool) -> tuple[AdamW8bit, list[float]]:
    """Train five steps through a GradScaler, one of them with an infinity; return its scales too."""
    optimizer, scaler = AdamW8bit(params, lr=LR), torch.amp.GradScaler("cpu", init_scale=1024.0)
    scales = []
    for step in range(5):
        optimizer.zero_grad()
        loss = sum((param * normal(*param.shape, seed=step)).sum() for param in params)
        scaler.scale(loss).backward()
        if step == inf_step:
            params[1].grad[0, 0] = math.inf  # type: ignore[index]
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return optimizer, scales


@pytest.mark.parametrize("unscale", [False, True], ids=["unscaled-by-the-step", "unscaled-before"])
def test_grad_scaler_steps_as_without_scaling(unscale: bool) -> None:
    scaled, plain = parameters(), parameters()
    scaled_run(scaled, None, unscale)
    optimizer = AdamW8bit(plain, lr=LR)
    for step in range(5):
        for param in plain:
            param.grad = normal(*param.shape, seed=step)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(scaled, plain))


@pytest.mark.parametrize("unscale", [False, True], ids=["unscaled-by-the-step", "unscaled-before"])
def test_grad_scaler_halves_its_scale_after_an_infinity_and_the_step_is_counted(unscale: bool) -> None:
    optimizer, scales = scaled_run(parameters(), 2, unscale)
    assert scales == [1024.0, 1024.0, 512.0, 512.0, 512.0]
    assert (optimizer.steps, optimizer.skipped_steps) == (4, 1)


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


# Surroundings


def test_states_are_float32_under_another_default_dtype(bfloat16_by_default: None) -> None:
    params = parameters(torch.bfloat16)
    optimizer = AdamW8bit(params)
    run(optimizer, params, range(2))
    big, small = optimizer.state[params[0]], optimizer.state[params[1]]
    assert big["m_absmax"].dtype == big["v_absmax"].dtype == small["m"].dtype == small["v"].dtype == torch.float32


def test_the_default_dtype_does_not_change_the_result() -> None:
    results = []
    for default in (torch.float32, torch.bfloat16):
        torch.set_default_dtype(default)
        try:
            params = [nn.Parameter(torch.ones(64, 80, dtype=torch.float32))]
            optimizer = AdamW8bit(params)
            params[0].grad = torch.ones(64, 80, dtype=torch.float32) / 3
            optimizer.step()
        finally:
            torch.set_default_dtype(torch.float32)
        results.append(params[0].detach())
    assert torch.equal(*results)


def test_another_default_device_does_not_matter() -> None:
    params = parameters(torch.bfloat16)
    set_gradients(params, 0)
    with torch.device("meta"):
        AdamW8bit(params).step()
    wanted = parameters(torch.bfloat16)
    run(AdamW8bit(wanted), wanted, range(1))
    assert all(torch.equal(one, other) for one, other in zip(params, wanted))


class NoHostReads(TorchDispatchMode):
    """Fails on any operation that hands a tensor's value to Python, which on a GPU waits for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a tensor was read on the host"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "grad-scaler"])
def test_a_step_on_fake_tensors_reads_nothing_on_the_host(scaled: bool) -> None:
    """Fake tensors have no values: `item()`, `bool()` and the like raise, as the negative control shows."""
    with FakeTensorMode(), NoHostReads():
        params = [nn.Parameter(torch.zeros(64, 80, dtype=torch.bfloat16)), nn.Parameter(torch.zeros(300))]
        optimizer = AdamW8bit(params)
        for _ in range(2):
            for param in params:
                param.grad = torch.zeros_like(param)
            if scaled:
                optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.zeros(1)
            optimizer.step()
        optimizer.set_moments(params[0], *optimizer.moments(params[0]))
    with pytest.raises(Exception, match=r"(?i)data-dependent|_local_scalar_dense"), FakeTensorMode():
        bool(torch.zeros(()) > 0)


# Refusals


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lr": -1.0}, "lr is -1.0"), ({"lr": math.nan}, "lr is nan"), ({"lr": math.inf}, "lr is inf"),
        ({"lr": None}, "lr is None"), ({"lr": "1e-3"}, "lr is '1e-3'"),
        ({"eps": -1e-8}, "eps is -1e-08"), ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"betas": (1.0, 0.999)}, "betas are"), ({"betas": (0.9, 1.0)}, "betas are"),
        ({"betas": (-0.1, 0.9)}, "betas are"), ({"betas": (math.nan, 0.9)}, "betas are"),
        ({"betas": 0.9}, "betas are 0.9"), ({"betas": (0.9,)}, "two numbers"),
        ({"rounding": "up"}, "rounding is 'up'.*stochastic"), ({"block_size": 100}, "block_size is 100"),
    ],
    ids=lambda value: "-".join(f"{name}={given}" for name, given in value.items()) if isinstance(value, dict) else "",
)  # fmt: skip
def test_bad_settings_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        AdamW8bit(parameters(), **settings)
    if not settings.keys() & {"rounding", "block_size"}:
        optimizer = AdamW8bit(parameters())
        with pytest.raises(InputError, match=words):
            optimizer.add_param_group({"params": parameters(), **settings})
        assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float64, torch.float8_e4m3fn], ids=str)
def test_parameters_of_other_dtypes_are_refused_and_leave_no_trace(dtype: torch.dtype) -> None:
    param = nn.Parameter(torch.zeros(5, dtype=dtype))
    with pytest.raises(InputError, match=f"{dtype}; dense float32"):
        AdamW8bit([param])
    optimizer = AdamW8bit(parameters())
    with pytest.raises(InputError, match="wanted"):
        optimizer.add_param_group({"params": [param]})
    assert len(optimizer.param_groups) == 1


def test_sparse_gradients_are_refused_before_anything_changes() -> None:
    params = parameters()
    optimizer = AdamW8bit(params)
    run(optimizer, params, range(1))
    embedding = nn.Embedding(10, 4, sparse=True)
    optimizer.add_param_group({"params": list(embedding.parameters())})
    before = [tensor.clone() for tensor in tensors_of(optimizer)]
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(InputError, match="sparse=False"):
        optimizer.step()
    assert all(torch.equal(tensor, old) for tensor, old in zip(tensors_of(optimizer), before))
    assert optimizer.steps == 1


def test_a_refused_first_step_makes_no_state() -> None:
    params = parameters()
    embedding = nn.Embedding(10, 4, sparse=True)
    optimizer = AdamW8bit([*params, *embedding.parameters()])
    set_gradients(params, 0)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(InputError, match="sparse=False"):
        optimizer.step()
    assert not optimizer.state


def test_sparse_parameters_are_refused() -> None:
    with pytest.raises(InputError, match="sparse"):
        AdamW8bit([nn.Parameter(torch.eye(3).to_sparse())])


def test_a_parameter_in_two_groups_is_refused() -> None:
    params = parameters()
    with pytest.raises(ValueError, match="more than one parameter group"):
        AdamW8bit([{"params": params}, {"params": params[:1]}])


def test_no_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        AdamW8bit([])
