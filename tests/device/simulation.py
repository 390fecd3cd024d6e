"""The dispatch mode that gives torch's operations on the simulated device their values.

torch runs its own CUDA code for each operation, which allocates, checks, launches and waits as on a GPU and computes
nothing; the mode queues the value on the same stream, found on the CPU once the stream gets there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from . import triton_launches
from .additions import unordered
from .simulated import enqueue, fault
from .values import FACTORIZATIONS, INDEXED, STAND_INS, VALUELESS, WAITING
from .views import host_tensor, is_cuda, keep, leaves, mapped, restore, view_of

_FAKE = torch._C._TorchDispatchModeKey.FAKE


class SimulatedDevice(TorchDispatchMode):
    """While it is entered, operations on the simulated device have values.

    largest: operations on tensors of more elements are launched and have no values, for runs of which only the host's
    side is of interest. `operations` counts those that were seen.
    """

    def __init__(self, largest: int | None = None) -> None:
        super().__init__()
        self.largest = largest
        self.operations: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = list(leaves((args, kwargs)))
        device = _device_of(given, kwargs)
        is_fake = any(isinstance(leaf, FakeTensor) for leaf in given) or torch._C._get_dispatch_mode(_FAKE) is not None
        if device is None or is_fake:
            return func(*args, **kwargs)
        name = func.name()
        self.operations[name] += 1
        if func.namespace == "lisa_kernels":
            # A kernel of ours, or torch's operations that define what has none: they are seen again.
            has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")
            key = torch._C.DispatchKey.CUDA if has_kernel else torch._C.DispatchKey.CompositeExplicitAutograd
            with self:
                return func._op_dk(key, *args, **kwargs)
        if name in VALUELESS:
            return func(*args, **kwargs)
        if _is_composite(name):
            with self:
                return func.decompose(*args, **kwargs)
        if name == "aten::copy_":
            return self._copy(func, *args, **kwargs)
        if name == "aten::_to_copy":
            return self._to_copy(func, *args, **kwargs)
        if any(each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns):
            return func(*args, **kwargs)
        if name in WAITING or (func._schema.name in INDEXED and _has_mask(args[1])):
            return self._wait(func, device, args, kwargs)
        if func._schema.name in FACTORIZATIONS:
            result = _shaped(func, device, args, kwargs)
        else:
            result = func(*args, **kwargs)
        self._queue(func, device, args, kwargs, result)
        return result

    def _queue(self, func: Any, device: int, args: Any, kwargs: Any, result: Any) -> None:
        tensors = [leaf for leaf in leaves((args, kwargs, result)) if is_cuda(leaf)]
        if self.largest is not None and any(tensor.numel() > self.largest for tensor in tensors):
            return
        kept = mapped(keep, (args, kwargs))
        results = [view_of(leaf) if is_cuda(leaf) else None for leaf in leaves(result)]
        in_place = any(_is_written(argument) for argument in func._schema.arguments)
        compute: Callable[..., Any] = STAND_INS.get(func.name()) or unordered(func) or func

        def work() -> None:
            given, named = mapped(restore, kept)
            values = leaves(compute(*given, **named))
            for view, value in zip([] if in_place else results, values):
                if view is None:
                    continue
                if view.shape != value.shape:
                    fault(f"{func.name()}: a device makes {view.shape}, the CPU {tuple(value.shape)}")
                host_tensor(view).copy_(value)

        enqueue(device, func.name(), work)

    def _wait(self, func: Any, device: int, args: Any, kwargs: Any) -> Any:
        torch.cuda.current_stream(device).synchronize()
        with _disable_current_modes():
            given, named = mapped(restore, mapped(keep, (args, kwargs)))
            value = func(*given, **named)
        if _is_written(func._schema.arguments[0]):
            return args[0]
        with self:
            return mapped(lambda leaf: leaf.to(f"cuda:{device}") if isinstance(leaf, Tensor) else leaf, value)

    def _copy(self, func: Any, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        if target.device == source.device:
            func(target, source, non_blocking)
            if self.largest is None or target.numel() <= self.largest:
                there, here = view_of(target), view_of(source)
                enqueue(target.device.index, "aten::copy_", lambda: host_tensor(there).copy_(host_tensor(here)))
            return target
        if _is_plain(target, source):
            # Bytes that the driver moves.
            func(target, source, non_blocking)
            return target
        with self:
            # As torch does: convert on the source's device, copy densely, spread on the target's.
            dense = source if source.dtype == target.dtype else source.to(target.dtype)
            dense = dense.expand(target.shape).contiguous()
            landing = target if target.is_contiguous() else torch.empty_like(dense, device=target.device)
            landing.copy_(dense, non_blocking)
            if landing is not target:
                target.copy_(landing)
        return target

    def _to_copy(self, func: Any, source: Tensor, **options: Any) -> Tensor:
        device = torch.device(options.get("device") or source.device)
        if device.type == "meta":
            made: Tensor = func(source, **options)
            return made
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        with self:
            result = torch.empty_like(
                source, dtype=options.get("dtype") or source.dtype, device=device,
                pin_memory=bool(options.get("pin_memory")),
                memory_format=options.get("memory_format") or torch.preserve_format,
            )  # fmt: skip
            return result.copy_(source, options.get("non_blocking", False))


@cache
def _is_composite(name: str) -> bool:
    """Whether a device runs an operation as several; where it has a kernel of its own, as for `silu_backward`, not."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return has_kernel(name, "CompositeImplicitAutograd") and not has_kernel(name, "CUDA")


def _device_of(given: list[Any], kwargs: dict[str, Any]) -> int | None:
    """Return the number of the device that an operation runs on, or None for the CPU."""
    for leaf in given:
        if is_cuda(leaf):
            number: int = leaf.device.index
            return number
    device = None if kwargs.get("device") is None else torch.device(kwargs["device"])
    if device is None or device.type != "cuda":
        return None
    return torch.cuda.current_device() if device.index is None else device.index


def _has_mask(indices: Any) -> bool:
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _is_plain(target: Tensor, source: Tensor) -> bool:
    same = target.dtype == source.dtype and target.shape == source.shape
    dense = target.is_contiguous() and source.is_contiguous()
    return same and dense and not any(tensor.is_conj() or tensor.is_neg() for tensor in (target, source))


def _shaped(func: Any, device: int, args: Any, kwargs: Any) -> Any:
    """Return what an operation would, of any values, after the check of devices that the real one makes."""
    if any(is_cuda(leaf) and leaf.device.index != device for leaf in leaves((args, kwargs))):
        raise RuntimeError(f"{func.name()}: expected all tensors to be on the same device")

    def meta(leaf: Any) -> Any:
        return leaf.to("meta") if isinstance(leaf, Tensor) else leaf

    def on_device(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=f"cuda:{device}")

    with _disable_current_modes():
        args, kwargs = mapped(meta, (args, kwargs))
        return mapped(on_device, func(*args, **kwargs))


triton_launches.listen()
