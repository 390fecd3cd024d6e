"""The store whose slabs the device and the host share: CUDA's unified memory, from `csrc/managed.cpp`.

A slab has one address for both; the driver moves its pages. They live on the host, are brought to the device before
they are used and sent back after; where the device has no room left, it reads them over the bus. CUDA's driver is
loaded at run time, so neither torch nor the package needs to be built for it.
"""

from __future__ import annotations

import ctypes
import sys
import weakref
from ctypes import byref, c_int64, c_void_p, py_object

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from lisa_kernels import native
from lisa_kernels.errors import InputError
from lisa_kernels.paging.store import Page, Store

DRIVER = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_MAX_ERROR = 512
# The capsule keeps the pointer to its name.
_DLPACK = b"dltensor"
_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.argtypes, _new_capsule.restype = [c_void_p, ctypes.c_char_p, c_void_p], py_object
_has_name = ctypes.pythonapi.PyCapsule_IsValid
_has_name.argtypes = [py_object, ctypes.c_char_p]


def _call(library: native.Library, name: str, *arguments: object) -> None:
    """Run one function of `csrc/managed.h`; RuntimeError with what the driver says where it fails."""
    error = ctypes.create_string_buffer(_MAX_ERROR)
    library.functions[f"managed_{name}"](*arguments, error, _MAX_ERROR)
    if error.value:
        raise RuntimeError(f'paging="managed": {error.value.decode(errors="replace")}')


class ManagedMemory:
    """Unified memory of one device, a CUDA device or (of device 0, as tensors of the host) the CPU.

    Its tensors may outlive it. Raises InputError where the driver or the device has no such memory or none is left,
    RuntimeError where another call of the driver fails. Threads may share it.
    """

    def __init__(self, device: torch.device, driver: str = DRIVER) -> None:
        library = native.load()
        if library is None:
            raise InputError(
                f'paging="managed" runs in the compiled library, and there is {native.why_absent()} Install it with '
                'one, or use paging="host".'
            )
        if device.type == "cuda":
            torch.cuda.init()
            device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        self.device, self._library, handle = device, library, c_void_p()
        try:
            _call(library, "open", driver.encode(), device.index or 0, byref(handle))
        except RuntimeError as error:
            raise InputError(f'{error}; use paging="host", which needs no unified memory.') from error
        self._handle = handle
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        weakref.finalize(self, _call, library, "close", handle).atexit = False

    def empty(self, nbytes: int) -> Tensor:
        """Return a tensor uint8 [nbytes] of any contents, whose memory is freed when it dies."""
        if nbytes == 0:
            return torch.empty(0, dtype=torch.uint8, device=self.device)
        managed = c_void_p()
        try:
            _call(self._library, "allocate", self._handle, nbytes, self.device.type == "cuda", byref(managed))
        except RuntimeError as error:
            raise InputError(
                f"{error}; pages hold {self.live_bytes} bytes already, of memory that is the host's. Give the machine "
                'more (RAM or swap; --memory of a container), or use paging="file:DIR" with a folder on a fast disk.'
            ) from error
        capsule = _new_capsule(managed, _DLPACK, None)
        try:
            return from_dlpack(capsule)
        finally:
            # torch gives another name to a capsule whose tensor it took over.
            if _has_name(capsule, _DLPACK):
                _call(self._library, "drop", managed)

    def to_device(self, slab: Tensor) -> None:
        """Begin to bring the slab's pages to the device; the current stream does not wait for them."""
        self._prefetch(slab, True)

    def to_host(self, slab: Tensor) -> None:
        """Begin to send the slab's pages home, after what is queued on the current stream."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        self._prefetch(slab, False)

    def arrive(self) -> None:
        """Let the current stream wait for all that is on its way."""
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)

    def settle(self) -> None:
        """Wait for all that is on its way, and for the work before it."""
        if self._stream is not None:
            self._stream.synchronize()

    @property
    def live_bytes(self) -> int:
        """How many bytes the driver has given and not got back."""
        count = c_int64()
        _call(self._library, "live_bytes", self._handle, byref(count))
        return count.value

    def _prefetch(self, slab: Tensor, to_device: bool) -> None:
        if slab.numel():
            stream = 0 if self._stream is None else self._stream.cuda_stream
            _call(self._library, "prefetch", self._handle, slab.data_ptr(), slab.numel(), to_device, stream)


class ManagedStore(Store):
    """Keeps pages in unified memory; nothing is copied by hand, and no page is in two places."""

    kind = "managed"

    def __init__(self, driver: str = DRIVER) -> None:
        self._driver = driver
        self._memories: dict[torch.device, ManagedMemory] = {}

    def page(self, name: str, nbytes: int, device: torch.device, slot_bytes: int = 0) -> ManagedPage:
        """Return a new page of zeros; InputError where `device` shares no memory with the host."""
        if device not in self._memories:
            self._memories[device] = ManagedMemory(device, self._driver)
        return ManagedPage(self._memories[device], name, nbytes)

    @property
    def nbytes(self) -> int:
        """How many bytes of unified memory the driver has given."""
        return sum(memory.live_bytes for memory in self._memories.values())

    def close(self) -> None:
        """Let go of the devices once the pages are gone."""
        self._memories.clear()


class ManagedPage(Page):
    """A slab with one address for device and host, whose pages the driver moves."""

    def __init__(self, memory: ManagedMemory, name: str, nbytes: int) -> None:
        super().__init__(name, nbytes, memory.device)
        self._memory = memory
        self._slab = memory.empty(nbytes)
        # Where the page is at home, and at once: `settle` waits for no work of the device's but its own.
        self.home().zero_()
        self._called = self._taken = False

    def prefetch(self) -> None:
        """Begin to bring the slab's pages to the device."""
        if not self._called:
            self._memory.to_device(self._slab)
            self._called = True

    def take(self) -> Tensor:
        """Return the slab, which is where it always is; its pages are on the device before the next work begins."""
        if not self._taken:
            self.prefetch()
            self._memory.arrive()
            self._taken = True
        return self._slab

    def give_back(self) -> None:
        """Begin to send the slab's pages home."""
        if self._taken:
            self._memory.to_host(self._slab)
            self._called = self._taken = False

    def home(self) -> Tensor:
        """Return the slab as a tensor of the host."""
        return torch.from_numpy(np.asarray(_OnHost(self._slab)))

    def settle(self) -> None:
        """Wait until the host may read what was last given back."""
        self._memory.settle()

    def free(self) -> None:
        """Give the slab's memory back once no tensor reads it; that waits for the device."""
        self._slab = self._slab.new_empty(0)


class _OnHost:
    """Unified memory as numpy takes it; the array keeps this, and this the memory."""

    def __init__(self, slab: Tensor) -> None:
        self.slab = slab
        self.__array_interface__ = {
            "shape": tuple(slab.shape), "typestr": "|u1", "data": (slab.data_ptr(), False), "version": 3,
        }  # fmt: skip
