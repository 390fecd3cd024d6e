"""Copies of tensors that wait in host memory, in buffers that are used again in the order of the device's stream."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from lisa_kernels.errors import InputError


def locked_memory(nbytes: int) -> Tensor:
    """Return uint8 [nbytes] of locked host memory; InputError where no more can be locked."""
    try:
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise InputError(
            f"no {nbytes} bytes of host memory can be locked for a checkpoint to wait in ({reason}); "
            "raise the limit of locked memory (ulimit -l), or train without offloaded activations."
        ) from error


class HostCopy:
    """One tensor's copy in a buffer."""

    def __init__(self, tensor: Tensor, device: torch.device, stream: Any) -> None:
        self.tensor, self.device, self.stream = tensor, device, stream


class HostCopies:
    """Sends tensors of a GPU to host memory and brings them back, on the current stream and without a wait.

    A buffer takes the next tensor as soon as its own is on the way back: one stream does both, in this order. So there
    are never more buffers than copies that waited at once, each as large as the largest it had, however far the host is
    ahead of the device. torch's own allocator waits for the device before it lends locked memory again, and takes new.

    memory: makes a buffer of so many bytes. stream: returns the current stream of a device.
    """

    def __init__(
        self,
        memory: Callable[[int], Tensor] = locked_memory,
        stream: Callable[[torch.device], Any] = torch.cuda.current_stream,
    ) -> None:
        self._memory, self._stream = memory, stream
        self._free: dict[Hashable, list[Tensor]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of a model has buffers of its own."""
        return HostCopies, (self._memory, self._stream)

    def send(self, tensor: Tensor) -> HostCopy:
        """Begin to copy a tensor to the host."""
        stream, nbytes = self._stream(tensor.device), tensor.numel() * tensor.element_size()
        free = self._free.setdefault((tensor.device, stream), [])
        buffer = self._take(free, nbytes)
        sent = HostCopy(buffer[:nbytes].view(tensor.dtype).view(tensor.shape), tensor.device, stream)
        sent.tensor.copy_(tensor, non_blocking=True)
        weakref.finalize(sent, free.append, buffer).atexit = False
        return sent

    def bring_back(self, sent: HostCopy) -> Tensor:
        """Begin to copy a tensor to its device again."""
        stream = self._stream(sent.device)
        if stream != sent.stream:
            stream.wait_stream(sent.stream)
        tensor = sent.tensor.to(sent.device, non_blocking=True, copy=True)
        if stream != sent.stream:
            sent.stream.wait_stream(stream)
        return tensor

    def _take(self, free: list[Tensor], nbytes: int) -> Tensor:
        """Return the smallest free buffer that is large enough, or a new one in the place of one that is too small."""
        fitting = [place for place, buffer in enumerate(free) if buffer.numel() >= nbytes]
        if fitting:
            return free.pop(min(fitting, key=lambda place: free[place].numel()))
        if free:
            free.pop()
        return self._memory(nbytes)
