"""A slot that stays beside its weight until it is settled into it: a master in host memory that learns now and then."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from types import MethodType
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from lisa_kernels.layers.linears import plain_function
from lisa_kernels.layers.master_home import Copies, MasterHome
from lisa_kernels.layers.slot import SlotModule
from lisa_kernels.ops.resting import rows_of_a_tile


class AccumulatingSlot(SlotModule):
    """A weight whose slot accumulates: what the layer computes with is decay · W + scale · Bᵀ P until `settle`.

    What learns is the master W. On a model that computes elsewhere it moves to host memory, page-locked, and stays
    there after `detach()`; it comes to the device a tile of rows at a time. One with a `home` is a file that is mapped:
    nothing writes into the parameter, which becomes another file, mapped as well, a tile at a time.
    """

    # Whether the slot waits to be settled, in the place of being folded after each step.
    accumulates = True
    kept: Tensor
    home: MasterHome | None = None
    # Of its model, which all its layers share; None until `share`.
    copies: Copies | None = None
    # Whether an optimizer has moved the slot since it began anew.
    stepped = False

    def _keep_master(self) -> None:
        """Have the weight be a master, which `share` moves to where masters are kept."""
        if self.tracker is not None:
            # Before a basis is found the slot is settled, which rounds.
            self.tracker.waits = True
        # What weight decay has left of the master since it was settled, as a factor.
        self.register_buffer("kept", torch.ones((), device=self.slot.device), persistent=False)
        self._saved: tuple[weakref.ref[Any], weakref.ref[Tensor]] | None = None

    def _passing(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield rows of the master where the layer computes, to be changed there; they are home once copies are."""
        whole = self._whole()
        # One that takes no memory is a plan's, of a device that does not hold it.
        if whole.device == self.device and whole.is_contiguous():
            return self._tiles(whole)
        assert self.copies is not None
        return self.copies.through(self._tiles(whole), self.device)

    def share(self, copies: Copies) -> None:
        """Move the master to host memory, from where these copies take it to the device and back."""
        self.copies = copies
        self._follow()

    def _follow(self) -> None:
        """Have the master in memory that suits the device where the layer computes."""
        if self.home is None and self.copies is not None:
            self.stored_weight.data = self.copies.in_memory(self.stored_weight.detach(), self.device)

    def hold_master(self) -> None:
        """Give a master without values the memory that it takes where a model computes in host memory."""
        self.stored_weight.data = torch.empty_like(self.stored_weight, memory_format=torch.contiguous_format)

    @property
    def device(self) -> torch.device:
        """Where the layer computes."""
        return self.slot.device

    @property
    def is_mapped(self) -> bool:
        """Whether the weight is what a file has, and takes no memory."""
        return self.home is not None

    @property
    def is_adapter(self) -> bool:
        """Whether the slot is a part of the layer's function: while it is active."""
        return self.active

    @torch.no_grad()
    def settle(self, key: Tensor | None) -> None:
        """Put the slot into the master, let that rest anew, and begin again at zero; `key` rounds a 16-bit master."""
        if self.home is None:
            for rows, here in self._passing():
                self._settle_rows(here, rows, key)
        else:
            self._become(self._settle_rows(self._copied(part), rows, key) for rows, part in self._tiles())
        self.begin_anew()

    def _settle_rows(self, here: Tensor, rows: slice, key: Tensor | None) -> Tensor:
        self._fold_rows(here, rows, key)
        self._rest_rows(here, rows)
        return here

    @torch.no_grad()
    def move_to(self, home: MasterHome, mapped: Tensor | None) -> None:
        """Have the master live there from now on; mapped: as it is there already, None: it is yet to be written."""
        self.home = home
        if mapped is None:
            mapped = home.write(part for _, part in self._tiles())
        self.stored_weight.data = mapped

    @torch.no_grad()
    def take_master(self, weight: Tensor) -> None:
        """Have another weight for a master, and let it rest."""
        if self.home is None:
            self.stored_weight.copy_(weight)
            self.rest_anew()
            return
        dtype = self.stored_weight.dtype
        self._become(self._rested(part.to(self.device, dtype), rows) for rows, part in self._tiles(weight.detach()))

    @torch.no_grad()
    def merge(self) -> None:
        """Have the layer's function, rounded to nearest, for a master; neither the slot nor the codes know of it."""
        if self.home is None:
            self.add_slot_(self.stored_weight.data)
        else:
            self._become(here for _, here in self._merged_tiles())

    def _rested(self, here: Tensor, rows: slice) -> Tensor:
        self._rest_rows(here, rows)
        return here

    def _become(self, tiles: Iterable[Tensor]) -> None:
        """Put tiles, which rest already, in the place of the master; where that fails all is as it was."""
        assert self.home is not None
        try:
            self.stored_weight.data = self.home.write(tiles)
        except BaseException:
            self.rest_anew()
            raise

    @torch.no_grad()
    def rest_anew(self) -> None:
        """Take the master as it is now: something else has written to it."""
        for rows, part in self._tiles():
            self._rest_rows(self._here(part), rows)

    def begin_anew(self) -> None:
        """Forget what the slot has learnt, and what decay has left."""
        super().begin_anew()
        self.kept.fill_(1.0)
        self.stepped = False

    def note_step(self, decay: Tensor) -> None:
        """Note a step of the slot, and what its decay leaves of the weight, float32 0-d."""
        self.kept *= decay
        self.stepped = True

    def deactivate(self, keep: bool = False) -> None:
        """Free the slot's storage, its gradient's, and the basis unless it is kept; the master is as it was settled."""
        super().deactivate(keep)
        self.kept.fill_(1.0)
        self.stepped = False

    @torch.no_grad()
    def add_slot_(self, weight: Tensor) -> Tensor:
        """Make a copy of the master what the layer has learnt, in place; returns it."""
        for rows, part in self._tiles(weight):
            here = self._here(part)
            self._fold_rows(here, rows, None)
            if here is not part:
                part.copy_(here)
        return weight

    @torch.no_grad()
    def holds(self, weight: Tensor) -> bool:
        """Return whether a weight is the layer's function as it would be saved; nothing is made of it but tiles."""
        return all(
            torch.equal(weight[rows].to(here.device, here.dtype), here) for rows, here in self._merged_tiles()
        )  # fmt: skip

    def _merged_tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield rows of the layer's function as a plain weight, where the layer computes."""
        for rows, part in self._tiles():
            if not self.is_adapter:
                yield rows, part
                continue
            here = self._copied(part)
            self._fold_rows(here, rows, None)
            yield rows, here

    def _merged(self) -> Tensor:
        if self.home is None or not self.is_adapter:
            return super()._merged()
        return self.home.aside(here for _, here in self._merged_tiles())

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.home is not None:
            self.home.check()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Load the layer's function as a plain weight; a master in a file becomes another file."""
        self.load_master(state_dict, f"{prefix}weight")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def load_master(self, state_dict: dict[str, Any], key: str) -> bool:
        """Take the master from there if it lives in a file and is another; whether it was, which it then is no more."""
        given = state_dict.get(key)
        if self.home is None or not isinstance(given, Tensor) or given.shape != self.stored_weight.shape:
            return False
        if self.holds(given):
            return False
        self.take_master(given)
        state_dict[key] = self.stored_weight
        return True

    def saved_in(self, destination: dict[str, Any]) -> Tensor:
        """Return the same tensor to all modules that read the weight, so that a tied one is saved once."""
        if self._saved is not None and self._saved[0]() is destination:
            known = self._saved[1]()
            if known is not None:
                return known
        merged = super().saved_in(destination)
        try:
            self._saved = weakref.ref(destination), weakref.ref(merged)
        except TypeError:
            # A plain dict of someone's, to which nothing can refer weakly.
            self._saved = None
        return merged

    def _fold_rows(self, here: Tensor, rows: slice, key: Tensor | None) -> None:
        self.fold_rows(here, rows.start, self.kept, key)

    def _rest_rows(self, here: Tensor, rows: slice) -> None:
        """Let some rows of the stored weight rest, which are where the layer computes."""

    def _tiles(self, weight: Tensor | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Yield rows of the master, or of what has its shape, a tile at a time."""
        weight = self._whole() if weight is None else weight
        step = rows_of_a_tile(weight.shape[1])
        for start in range(0, len(weight), step):
            rows = slice(start, min(start + step, len(weight)))
            yield rows, weight[rows]

    def _whole(self) -> Tensor:
        """Return the master, which nobody else has changed."""
        if self.home is not None:
            self.home.check()
        if self.copies is not None:
            self.copies.finish_for(self.stored_weight)
        return self.stored_weight.detach()

    def _here(self, part: Tensor) -> Tensor:
        """Return rows of a master where the layer computes: themselves, or a copy while it is worked on."""
        # One that takes no memory is a plan's, of a device that does not hold it.
        return part if part.device == self.device and part.is_contiguous() else self._copied(part)

    def _copied(self, part: Tensor) -> Tensor:
        return torch.empty(part.shape, dtype=part.dtype, device=self.device).copy_(part)


def accumulates(layer: nn.Module) -> TypeGuard[AccumulatingSlot]:
    """Return whether a layer's slot waits to be settled."""
    return isinstance(layer, AccumulatingSlot) and layer.accumulates


def keep_where_it_is(module: nn.Module) -> None:
    """Have a module's own parameters and buffers stay when the model is moved or cast; its children's go along."""
    module._apply = MethodType(_apply_to_children, module)  # type: ignore[method-assign]


@plain_function
def _apply_to_children(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    for child in module.children() if recurse else ():
        child._apply(fn)
    return module


def put_host_memory_last(module: nn.Module) -> None:
    """Have `module.parameters()` name what is in host memory after what is not, until `module.parameters` is deleted.

    Whoever wants to know where a model computes asks its first parameter, transformers and trainers included; that is
    most often the table of the token embedding.
    """
    module.parameters = MethodType(_host_memory_last, module)  # type: ignore[method-assign]


@plain_function
def _host_memory_last(module: nn.Module, recurse: bool = True) -> Iterator[nn.Parameter]:
    return iter(sorted(type(module).parameters(module, recurse), key=lambda param: param.device.type == "cpu"))


def hold_masters(model: nn.Module) -> None:
    """Give masters without values the memory that they take where a model computes in host memory: for a plan."""
    for layer in model.modules():
        if isinstance(layer, AccumulatingSlot) and layer.home is None:
            layer.hold_master()
