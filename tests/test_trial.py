"""Every kernel once on a device, beside the CPU: what is broken, and what is wrong, is told."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lisa_kernels import trial
from lisa_kernels.ops.dispatch import KERNEL_OPS, PRODUCT_OPS
from lisa_kernels.trial import difference, try_kernels


def test_every_operation_with_kernels_is_tried_and_right(device: torch.device) -> None:
    found = try_kernels(device)
    assert {each.op for each in found} == {*KERNEL_OPS, *PRODUCT_OPS}
    assert [each.problem for each in found] == [""] * len(found)


def test_a_kernel_that_does_not_compile_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the others are tried all the same."""

    def broken(device: torch.device) -> list[Tensor]:
        raise RuntimeError("PTX is too new\nmore")

    monkeypatch.setattr(trial, "_RUNS", {"fold_": broken, "project": trial._RUNS["project"]})
    assert [each.problem for each in try_kernels(torch.device("cpu"))] == ["RuntimeError: PTX is too new", ""]


@pytest.mark.parametrize("kind", ["codes", "values"])
def test_a_result_that_is_wrong_is_found(kind: str) -> None:
    """One code in a thousand may fall on the other side of a boundary; ten may not, nor a value beyond rounding."""
    if kind == "codes":
        right = torch.arange(1000).to(torch.uint8)
        near, far = right.clone(), right.clone()
        near[0] += 1
        far[:20] += 1
    else:
        right = torch.linspace(-1, 1, 1000)
        near, far = right + 1e-6, right + 1e-3
    assert difference([right, near], [right, right]) == ""
    assert "result 1" in difference([right, far], [right, right])


def test_a_result_that_is_no_number_is_found() -> None:
    right = torch.ones(4)
    assert difference([torch.full((4,), torch.nan)], [right])
