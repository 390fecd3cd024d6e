"""Defaults, fake tensors and mistakes around `AdamW8bit`: none changes a result or leaves a trace."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lisa_kernels.errors import InputError
from lisa_kernels.optim import AdamW8bit

from .steps import parameters, run, set_gradients, tensors_of


@pytest.fixture
def bfloat16_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


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
