"""What layers that left need again besides their moments: bases and remainders, or weights, a page for each unit."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from lisa_kernels.methods.units import Unit
from lisa_kernels.paging import Entry, Page, SlabLayout, Store

# The buffers of a layer that wait with it, by their names there.
KEPT = ("basis", "remainder")


class Shelf:
    """Keeps tensors of resting units in pages: they move when a layer leaves and when it returns, and at no step.

    kind: what is kept; the names of pages begin with it.
    """

    def __init__(self, store: Callable[[], Store], kind: str = "bases") -> None:
        self._store, self._kind = store, kind
        self._pages: dict[str, tuple[Page, SlabLayout]] = {}

    def put(self, unit: Unit, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Write a unit's tensors, by the path of their layer and their name there, in the place of earlier ones."""
        named = {f"{path}/{name}": tensor for path, each in tensors.items() for name, tensor in each.items()}
        if not named:
            self.forget(unit)
            return
        layout = SlabLayout(Entry(name, tuple(tensor.shape), tensor.dtype) for name, tensor in named.items())
        if unit.name not in self._pages or self._pages[unit.name][1].entries != layout.entries:
            self.forget(unit)
            page = self._store().page(f"{self._kind}-{unit.name}", layout.nbytes, next(iter(named.values())).device)
            self._pages[unit.name] = page, layout
        page, layout = self._pages[unit.name]
        places = layout.views(page.take())
        for name, tensor in named.items():
            places[name].copy_(tensor)
        page.give_back()

    def prefetch(self, unit: Unit) -> None:
        """Begin to bring a unit's tensors to the device."""
        if unit.name in self._pages:
            self._pages[unit.name][0].prefetch()

    def take(self, unit: Unit) -> dict[str, dict[str, Tensor]]:
        """Return a unit's tensors on its device, and keep them no more; empty where there are none."""
        if unit.name not in self._pages:
            return {}
        page, layout = self._pages[unit.name]
        tensors = _by_path(layout.views(page.take()))
        self.forget(unit)
        return tensors

    def forget(self, unit: Unit) -> None:
        """Keep a unit's tensors no more."""
        if unit.name in self._pages:
            self._pages.pop(unit.name)[0].free()

    def held(self) -> dict[str, dict[str, Tensor]]:
        """Return all that is kept, by path and name, to be read and not written."""
        found: dict[str, dict[str, Tensor]] = {}
        for name in self._pages:
            found.update(self.held_of(name))
        return found

    def held_of(self, name: str) -> dict[str, dict[str, Tensor]]:
        """Return what is kept of the unit of this name, to be read and not written."""
        page, layout = self._pages[name]
        page.settle()
        return _by_path(layout.views_apart(page.home()))


def _by_path(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        path, _, name = key.rpartition("/")
        found.setdefault(path, {})[name] = tensor
    return found
