"""Count what makes the host wait for a device, on fake tensors: each is answered, and noted with its place."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode

import lisa_kernels

PACKAGE = Path(lisa_kernels.__file__).parent
aten = torch.ops.aten
# Operations of this package whose results are as long as a device's values say.
WAIT_INSIDE = {"lisa_kernels::counted_rows"}


class IdleMode(FakeTensorMode):
    """Fake tensors whose devices answer, with each wait of the host for one noted by the line of this package it is in.

    A wait is a value that is asked for, a number of elements that depends on values, and a copy from or to the host
    that is not told to run by itself, or has no locked memory on the host's side. What is asked is answered with True
    and 1, and so is what has come from a device to the host. `own` is of this package, `others` of a model's own code;
    whoever wants to count anew clears them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.own: Counter[str] = Counter()
        self.others: Counter[str] = Counter()
        # Kept, so that no address of theirs is given to another storage.
        self._locked: dict[int, Tensor] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Nothing is compiled here, and skipping loads the compiler: four seconds.
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, or answer in the place of a device that has no values."""
        kwargs = kwargs or {}
        if func is aten._pin_memory.default:
            copy = self.dispatch(aten.clone.default, types, args)
            self._locked[_storage(copy)] = copy
            return copy
        if func is aten.is_pinned.default:
            return _storage(args[0]) in self._locked
        if func is aten._local_scalar_dense.default and args[0].constant is None:
            if args[0].is_cuda:
                self.note()
            return answer(args[0])
        if func.namespace == "lisa_kernels" and func._schema.name in WAIT_INSIDE:
            self.note()
        elif func is aten._to_copy.default:
            target = torch.device(kwargs.get("device") or args[0].device)
            self._see_copy(args[0], target.type, None, kwargs.get("non_blocking", False))
        elif func is aten.copy_.default:
            self._see_copy(args[1], args[0].device.type, args[0], args[2] if len(args) > 2 else False)
        return self.dispatch(func, types, args, kwargs)

    def _see_copy(self, source: Tensor, target_type: str, target: Tensor | None, by_itself: bool) -> None:
        if {source.device.type, target_type} != {"cpu", "cuda"}:
            return
        host = source if source.device.type == "cpu" else target
        if not (by_itself and host is not None and _storage(host) in self._locked):
            self.note()

    def note(self) -> None:
        """Count a wait in the line that is at work."""
        place = _place()
        (self.others if place is None else self.own)[place or "the model"] += 1


@contextmanager
def lists_in_one_wait() -> Iterator[None]:
    """Have a list of a device's numbers be one wait, as it is; to torch's fake tensors it is one for each number."""
    one_by_one = FakeTensor.tolist

    def tolist(tensor: FakeTensor) -> Any:
        if not tensor.is_cuda:
            return one_by_one(tensor)
        tensor.fake_mode.note()
        return _nested(list(tensor.shape), answer(tensor))

    with mock.patch.object(FakeTensor, "tolist", tolist):
        yield


def answer(tensor: Tensor) -> bool | int | float:
    """Return what the host is told of any number on a device."""
    if tensor.dtype == torch.bool:
        return True
    return 1.0 if tensor.dtype.is_floating_point else 1


def _nested(shape: list[int], value: Any) -> Any:
    return value if not shape else [_nested(shape[1:], value) for _ in range(shape[0])]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _place() -> str | None:
    """Return the innermost line of this package that is at work, as `room/file.py: function`; None outside of it."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE):
            return f"{path.relative_to(PACKAGE).as_posix()}: {frame.f_code.co_name}"
        frame = frame.f_back
    return None
