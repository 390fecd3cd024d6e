"""Gradients of several ranks become their mean at the end of a backward, whatever each of them has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from distributed.ranks import on_ranks
from lisa_kernels import InputError
from lisa_kernels.distributed import GradientReduction, check_wire_dtype, ranks_of, reduction


@contextmanager
def reduced() -> Iterator[list[tuple[torch.dtype, int]]]:
    """Note dtype and elements of every tensor that is summed."""
    seen: list[tuple[torch.dtype, int]] = []
    real = dist.all_reduce

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append((tensor.dtype, tensor.numel()))
        return real(tensor, *args, **kwargs)

    dist.all_reduce = counted
    try:
        yield seen
    finally:
        dist.all_reduce = real


class Four(nn.Module):
    """Parameters of two dtypes, one that only rank 1 uses and one that nobody does."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Parameter(torch.ones(3, 2))
        self.narrow = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
        self.seldom = nn.Parameter(torch.ones(5))
        self.never = nn.Parameter(torch.ones(6))

    def loss(self, rank: int, factor: float = 1.0) -> Tensor:
        loss = (self.wide.sum() + self.narrow.float().sum()) * factor * (rank + 1)
        return loss + self.seldom.sum() * factor if rank else loss

    def grads(self) -> list[list[float] | None]:
        return [None if p.grad is None else p.grad.flatten().tolist() for p in self.parameters()]


def everything(rank: int) -> dict[str, Any]:
    ranks = ranks_of("auto")
    assert ranks is not None
    found: dict[str, Any] = {}
    model, average = Four(), GradientReduction(ranks)
    average.follow(model.parameters())
    with reduced() as found["wire"]:
        model.loss(rank).backward()
    found["once"] = model.grads()
    model.loss(rank).backward()
    found["added up"] = model.grads()
    model.zero_grad()
    with average.no_sync():
        model.loss(rank).backward()
    found["unsent"] = model.grads()
    try:
        average.before_step()
    except InputError as error:
        found["refused"] = str(error)
    model.loss(rank, 3.0).backward()
    found["sent at last"] = model.grads()
    average.before_step()
    model.zero_grad()
    # A rank that has nothing to learn from still takes part, in its step.
    if rank:
        model.loss(rank).backward()
    average.before_step()
    found["one only"] = model.grads()
    model.zero_grad()
    (model.loss(rank) * (float("nan") if rank else 1.0)).backward()
    found["not a number"] = model.grads()
    average.before_step()
    average.remove()
    model.zero_grad()
    model.loss(rank).backward()
    found["removed"] = model.grads()
    small = Four()
    narrow = GradientReduction(ranks, check_wire_dtype("bf16"))
    narrow.follow(small.parameters())
    with reduced() as found["narrow wire"]:
        small.loss(rank, 1.001).backward()
    found["narrow"] = [p.grad.dtype for p in small.parameters() if p.grad is not None], small.grads()
    reduction.PORTION_BYTES = 24
    again = Four()
    cut = GradientReduction(ranks)
    cut.follow(again.parameters())
    with reduced() as found["cut wire"]:
        again.loss(rank).backward()
    found["cut"] = again.grads()
    return found


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return on_ranks(everything)


MEAN = [[1.5] * 6, [1.5] * 4, [0.5] * 5, None]
GRADIENTS = {
    "once": MEAN,
    "added up": [[3.0] * 6, [3.0] * 4, [1.0] * 5, None],
    "sent at last": [[6.0] * 6, [6.0] * 4, [2.0] * 5, None],
    "one only": [[1.0] * 6, [1.0] * 4, [0.5] * 5, None],
    "cut": MEAN,
}


@pytest.mark.parametrize("case", GRADIENTS)
def test_gradients_are_the_mean(case: str, found: list[dict[str, Any]]) -> None:
    """Missing ones count as zeros, those that no rank has stay None, and what was averaged may be averaged again."""
    for each in found:
        assert each[case] == GRADIENTS[case]


def test_one_collective_for_each_dtype(found: list[dict[str, Any]]) -> None:
    """Of what some rank has, and nothing else; more of them only where there is very much."""
    for each in found:
        assert each["wire"] == [(torch.float32, 11), (torch.bfloat16, 4)]
        assert each["narrow wire"] == [(torch.bfloat16, 15)]
        assert each["cut wire"] == [(torch.float32, 6), (torch.float32, 5), (torch.bfloat16, 4)]


def test_gradients_keep_their_dtype_on_a_narrow_wire(found: list[dict[str, Any]]) -> None:
    """They are rounded on their way, and equal on all ranks."""
    dtypes, values = found[0]["narrow"]
    assert dtypes == [torch.float32, torch.bfloat16, torch.float32]
    assert values[0] == pytest.approx([1.5015] * 6, rel=2**-8)
    assert found[1]["narrow"] == found[0]["narrow"]


def test_no_sync_keeps_gradients_at_home(found: list[dict[str, Any]]) -> None:
    """A step on them is refused, for ranks would part."""
    for rank, each in enumerate(found):
        assert each["unsent"][0] == [1.0 + rank] * 6
        assert "under no_sync()" in each["refused"]
        assert each["removed"][0] == [1.0 + rank] * 6


def test_a_gradient_that_is_no_number_is_none_anywhere(found: list[dict[str, Any]]) -> None:
    for each in found:
        assert all(value != value for value in each["not a number"][0])


def test_an_unknown_wire_dtype_is_refused() -> None:
    with pytest.raises(InputError, match="wire_dtype is 'fp8'"):
        check_wire_dtype("fp8")
