"""What every store promises: pages, each the home of one slab of bytes, and the way to the device and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor


class Page(ABC):
    """The home of one slab: take it to the device, work on it, give it back.

    A slab is `nbytes` bytes that the page knows nothing of. Between `take` and `give_back` the bytes on the device
    are the true ones, otherwise those at home. Nothing here waits for the device except `home`, `settle` and what a
    store says of itself.
    """

    def __init__(self, name: str, nbytes: int, device: torch.device) -> None:
        self.name, self.nbytes, self.device = name, nbytes, device

    @abstractmethod
    def prefetch(self) -> None:
        """Begin to bring the slab to the device; does nothing where it is there or on its way, or was never written."""

    @abstractmethod
    def take(self) -> Tensor:
        """Return the slab, uint8 [nbytes] on the device, for work queued on the current stream from now on.

        A page that was never given back is zeros. A second `take` before `give_back` returns the same tensor. Raises
        InputError where the home cannot be read or is not what was written; the page then is as it was before.
        """

    @abstractmethod
    def give_back(self) -> None:
        """Write the slab home, after the work queued on the current stream so far, and free what it takes there.

        Does nothing where the slab was not taken. Raises InputError where it cannot be written: the home is then as it
        was before `take`, and the slab is still the device's.
        """

    @abstractmethod
    def home(self) -> Tensor:
        """Return the slab at home, uint8 [nbytes], to be read and not written; it may be still on its way.

        Valid until the page is next given back or freed, its bytes after `settle`.
        """

    def settle(self) -> None:  # noqa: B027  (only copies that run on their own are waited for)
        """Wait until `home` holds what was last given back."""

    @abstractmethod
    def free(self) -> None:
        """Forget the slab and give its home back to the store; the page is not used again."""


class Store(ABC):
    """Keeps pages somewhere: on the device, in host memory, in files."""

    kind: ClassVar[str]

    @abstractmethod
    def page(self, name: str, nbytes: int, device: torch.device, slot_bytes: int = 0) -> Page:
        """Return a new page of zeros for slabs that are worked on on `device`.

        name: of letters, digits, dots and dashes; no two pages in use share one. slot_bytes: above 0 for pages that
        come for a moment, one after the other, and are no larger unless a single tensor is: where slabs are copied
        they share a few pieces of the device's memory of this size at most.
        """

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """How many bytes the store holds for pages, in use or waiting to be used again."""

    def close(self) -> None:  # noqa: B027  (most stores hold nothing that outlives them)
        """Give back what the store holds; its pages are not used again."""
