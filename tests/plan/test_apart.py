"""A plan that is made in a process of its own: what it raises, and what becomes of one that dies."""

from __future__ import annotations

import os

import pytest

from lisa_kernels.errors import InputError, NotRehearsedError
from lisa_kernels.plan.apart import run_apart
from lisa_kernels.sizes import parse_size


def test_a_mistake_is_told_as_one() -> None:
    with pytest.raises(InputError, match="'much'"):
        run_apart(parse_size, "much")


@pytest.mark.slow
def test_one_that_dies_is_a_plan_less() -> None:
    """And no run."""
    with pytest.raises(NotRehearsedError, match="ended with 3"):
        run_apart(os._exit, 3)
