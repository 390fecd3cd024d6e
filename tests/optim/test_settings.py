"""Numbers that make no sense are refused before a step is taken with them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lisa_kernels.errors import InputError
from lisa_kernels.optim.settings import as_number, check_hyper, check_settings

GROUP = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
SETTINGS: dict[str, Any] = {"block_size": 256, "rounding": "nearest", "max_grad_norm": None, "paging": None}


def test_what_makes_sense_passes() -> None:
    check_hyper(GROUP)
    check_hyper({**GROUP, "lr": torch.tensor(0.1), "betas": [0.0, 0.5]})
    check_settings(**SETTINGS)
    check_settings(**{**SETTINGS, "max_grad_norm": 1, "paging": "host"})


@pytest.mark.parametrize(
    ("name", "value"),
    [("lr", -1.0), ("lr", math.nan), ("eps", "1"), ("weight_decay", math.inf), ("betas", (0.9, 1.0)), ("betas", 0.9)],
)
def test_hyper_parameters_out_of_range_are_refused(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=name):
        check_hyper({**GROUP, name: value})


@pytest.mark.parametrize(
    ("name", "value"), [("block_size", 100), ("rounding", "up"), ("max_grad_norm", 0.0), ("paging", "disk")]
)
def test_settings_out_of_range_are_refused(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=name):
        check_settings(**{**SETTINGS, name: value})


def test_what_is_no_number_is_nan() -> None:
    assert as_number(torch.tensor(2)) == 2.0
    assert all(math.isnan(as_number(value)) for value in ("2", None, [1], torch.ones(2)))
