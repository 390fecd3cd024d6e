"""The states of an optimizer's parameters in pages of a store, brought to the device while they are worked on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lisa_kernels.paging import Entry, Page, SlabLayout, Store

# Bytes of state that a step has on the device at a time, and as many on their way there.
PAGE_BYTES = 1 << 26

# torch's `Optimizer.state`: of each parameter its tensors by name.
States: TypeAlias = MutableMapping[Tensor, Any]


class _StatePage:
    """The page of some parameters' states, and where the tensors are in it."""

    def __init__(self, page: Page, layout: SlabLayout, params: Sequence[Tensor], names: Sequence[list[str]]) -> None:
        self.page, self.layout = page, layout
        # Of each parameter its tensors, one after the other in the layout.
        self.names = names
        # In the order of the layout; None where a parameter's state was forgotten.
        self.params: list[Tensor | None] = list(params)
        self.at_hand = False
        self._home: tuple[Tensor, dict[str, Tensor]] | None = None

    def _show(self, states: States, views: Mapping[str, Tensor]) -> None:
        """Make these the parameters' states."""
        each = iter(views.values())
        for param, names in zip(self.params, self.names):
            tensors = {name: next(each) for name in names}
            if param is not None:
                states[param].update(tensors)

    def take(self, states: States) -> None:
        """Bring the states to the device."""
        if not self.at_hand:
            self._show(states, self.layout.views(self.page.take()))
            self.at_hand = True

    def give_back(self, states: States) -> None:
        """Bring the states home."""
        if self.at_hand:
            self.page.give_back()
            self.at_hand = False
            home = self.page.home()
            if self._home is None or self._home[0] is not home:
                self._home = home, self.layout.views_apart(home)
            self._show(states, self._home[1])


class PagedStates:
    """Keeps states in pages: `optimizer.state` holds views of their homes, and of the device's slabs meanwhile.

    Parameters of one unit and device share pages of up to `PAGE_BYTES`; `stay` makes it one page for each, which stays
    on the device once it was needed there, until `put_away`. States begin as zeros throughout.
    """

    def __init__(
        self, open_store: Callable[[], Store], new_state: Callable[[Tensor], dict[str, Tensor]],
        unit_of: Callable[[Tensor], int], device_of: Callable[[Tensor], torch.device], *, stay: bool,
    ) -> None:  # fmt: skip
        self._open_store, self._new_state, self.stay = open_store, new_state, stay
        self._unit_of, self._device_of = unit_of, device_of
        self._store: Store | None = None
        self._pages: dict[Tensor, _StatePage] = {}
        self._made = 0

    def open(self) -> Store:
        """Return the store, opened when it is first asked for; InputError where it cannot work here."""
        if self._store is None:
            self._store = self._open_store()
        return self._store

    def check(self, devices: Iterable[torch.device]) -> None:
        """Raise InputError where the store cannot hold pages for these devices."""
        for device in dict.fromkeys(devices):
            self.open().page("check", 1, device).free()

    # Which states move together

    def windows(self, params: Iterable[Tensor]) -> list[list[Tensor]]:
        """Return the parameters in lists whose states are on the device together, one list at a time."""
        params = list(params)
        if self.stay:
            return [params]
        settled: dict[_StatePage, list[Tensor]] = {}
        for param in params:
            if param in self._pages:
                settled.setdefault(self._pages[param], []).append(param)
        return [*settled.values(), *self._portions(param for param in params if param not in self._pages)]

    def _portions(self, params: Iterable[Tensor]) -> list[list[Tensor]]:
        """Return parameters without a page in lists that get a page each."""
        open_portions: dict[tuple[torch.device, int], list[Tensor]] = {}
        sizes: dict[tuple[torch.device, int], int] = {}
        portions = []
        for param in params:
            key, size = (self._device_of(param), self._unit_of(param)), SlabLayout(self._entries([param], {})).nbytes
            if key not in open_portions or (not self.stay and sizes[key] + size > PAGE_BYTES):
                open_portions[key], sizes[key] = [], 0
                portions.append(open_portions[key])
            open_portions[key].append(param)
            sizes[key] += size
        return portions

    def _entries(self, params: Sequence[Tensor], states: States) -> Iterator[Entry]:
        for number, param in enumerate(params):
            for name, tensor in (states.get(param) or self._new_state(param)).items():
                yield Entry(f"{number}.{name}", tuple(tensor.shape), tensor.dtype)

    # Moving them

    @contextmanager
    def at_hand(self, states: States, params: Iterable[Tensor], make: bool = False) -> Iterator[None]:
        """Have these parameters' states on the device for the block; make those that there are not yet, if asked."""
        params = [param for param in params if make or states.get(param)]
        self._make_pages(states, params)
        moved = [page for page in self._pages_of(params) if not page.at_hand]
        try:
            for page in moved:
                page.take(states)
            yield
        finally:
            if not self.stay:
                for page in moved:
                    page.give_back(states)

    def _pages_of(self, params: Iterable[Tensor]) -> list[_StatePage]:
        return list(dict.fromkeys(self._pages[param] for param in params if param in self._pages))

    def _make_pages(self, states: States, params: Iterable[Tensor]) -> None:
        for portion in self._portions(param for param in params if param not in self._pages):
            layout = SlabLayout(self._entries(portion, states))
            names = [list(states.get(param) or self._new_state(param)) for param in portion]
            slot_bytes = 0 if self.stay else PAGE_BYTES
            page = self.open().page(f"state-{self._made}", layout.nbytes, self._device_of(portion[0]), slot_bytes)
            self._made += 1
            held = _StatePage(page, layout, portion, names)
            before = {param: dict(states.get(param) or {}) for param in portion}
            for param in portion:
                states[param] = {}
            self._pages.update(dict.fromkeys(portion, held))
            # What was loaded or copied comes in here; a new state is zeros, and moves with its first use.
            if any(before.values()):
                held.take(states)
                for param, values in before.items():
                    for name, value in values.items():
                        states[param][name].copy_(value)
                held.give_back(states)

    def adopt(self, states: States) -> None:
        """Give pages to all states there are, for instance from a checkpoint, and leave them at home."""
        for portion in self._portions([param for param in states if states[param] and param not in self._pages]):
            self._make_pages(states, portion)

    def prefetch(self, params: Iterable[Tensor]) -> None:
        """Begin to bring to the device the states that these parameters have."""
        for page in self._pages_of(params):
            page.page.prefetch()

    def put_away(self, states: States, params: Iterable[Tensor]) -> None:
        """Bring states home that stayed."""
        for page in self._pages_of(params):
            page.give_back(states)

    def forget(self, params: Iterable[Tensor]) -> None:
        """Free the pages whose last parameter is among these."""
        gone = set(params)
        for page in self._pages_of(gone):
            page.params = [None if param in gone else param for param in page.params]
            if not any(param is not None for param in page.params):
                page.page.free()
        for param in gone:
            self._pages.pop(param, None)

    def bring_home(self, states: States) -> None:
        """Have all states at home, on the CPU and ready to be read; the next use brings them back."""
        for page in dict.fromkeys(self._pages.values()):
            page.give_back(states)
            page.page.settle()

    def clear(self) -> None:
        """Forget all states."""
        self.forget(list(self._pages))

    def close(self) -> None:
        """Forget all states and close the store."""
        self.clear()
        if self._store is not None:
            self._store.close()
            self._store = None
