"""Watch every operation of a run and note the births and deaths of the storages on its device."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from lisa_kernels.layers.blocks import output_layer
from lisa_kernels.ops.linear_cross_entropy import LOSS_NODE
from lisa_kernels.plan.stand_ins import tensors_in
from lisa_kernels.plan.trace import Event, Trace

# What a storage counts as when it is several things: an earlier name goes before a later one.
PRECEDENCE = (
    "weights", "gradients", "optimizer state", "bases", "pages", "loss", "saved activations", "temporaries",
)  # fmt: skip
RANK = {category: rank for rank, category in enumerate(PRECEDENCE)}


@dataclass(slots=True)
class _Storage:
    """One storage: its birth, and what it has turned out to be so far."""

    number: int
    bytes: int
    category: str
    phase: str
    operation: str
    module: str
    # Whether it was born in a forward, the one of a checkpointed block's recomputation too.
    in_forward: bool


# Operation, arguments, keyword arguments, result, phase, part.
Watch = Callable[[Any, tuple[Any, ...], Mapping[str, Any], Any, str, str], None]


def _call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return func(*args, **kwargs)


def _nothing(func: Any, args: tuple[Any, ...]) -> Sequence[Tensor]:
    return ()


class StorageTracker(TorchDispatchMode):
    """Records every storage that an operation makes on one kind of device, from birth to death.

    What lives inside a compiled kernel, or an operation of `torch.library`, is not seen, unless it is told (`inside`,
    `definitions`): the buffers of a matrix product or an attention kernel.
    A storage's category is what it turns out to be (`label`); until then it is "temporaries". What a forward makes and
    a backward reads is "saved activations", a checkpointed block's recomputation included; what is made from the
    output layer on, and in the loss's backward, "loss".

    call: runs an operation, given (operation, arguments, keyword arguments). inside: tells what an operation, given
    with its arguments, holds on the device while it runs and gives back. definitions: operations that are several.
    watch: is told each operation with arguments, keyword arguments, result, phase, and whether it is a "forward"'s, the
    "recomputation" of one, a "backward"'s or neither ("").
    """

    def __init__(
        self, device_type: str, call: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any] = _call,
        inside: Callable[[Any, tuple[Any, ...]], Sequence[Tensor]] = _nothing,
        definitions: Mapping[Any, Any] = MappingProxyType({}), watch: Watch | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.watch = watch
        self.device_type, self.call, self.inside, self.definitions = device_type, call, inside, definitions
        self.recording = False
        # Tells tensors whose storages are given up and taken again, many at once and without an operation: weights that
        # ranks gather.
        self.resized: Callable[[], Iterable[Sequence[Tensor]]] = tuple
        self._phase, self._work, self._in_loss = "", "", False
        self._modules: list[str] = []
        self._alive: dict[int, _Storage] = {}
        self._references: dict[int, weakref.ref[Any]] = {}
        self._log: list[tuple[_Storage, bool, str, str]] = []
        self._names: dict[Any, str] = {}

    # What happens

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and note what it read and made."""
        self.follow_sizes()
        held = self.inside(func, args) if self.recording else ()
        for tensor in held:
            self._note(tensor, func)
        definition = self.definitions.get(func) if self.recording else None
        if definition is not None:
            with self:
                return definition(*args, **(kwargs or {}))
        result = self.call(func, args, kwargs or {})
        if self.recording:
            if self._work == "backward" and not self._modules:
                for tensor in args:
                    if isinstance(tensor, Tensor):
                        self._read(tensor)
            for tensor in tensors_in(result):
                self._note(tensor, func)
            if self.watch is not None:
                self.watch(func, args, kwargs or {}, result, self._phase, self._part())
        return result

    @property
    def phase_name(self) -> str:
        """The phase that runs, "" outside of all."""
        return self._phase

    @property
    def events(self) -> int:
        """How many births and deaths there were so far."""
        return len(self._log)

    def _part(self) -> str:
        """Return what kind of work is being done, as `watch` is told it."""
        if self._work == "backward" and self._modules:
            return "recomputation"
        return self._work

    def _read(self, tensor: Tensor) -> None:
        storage = self._alive.get(tensor.untyped_storage()._cdata)
        if storage is not None and storage.in_forward and storage.category == "temporaries":
            storage.category = "saved activations"

    def _note(self, tensor: Tensor, func: Any = None) -> _Storage | None:
        """Return the record of a tensor's storage, made if it is new; None of one elsewhere, or of no bytes."""
        if tensor.device.type != self.device_type:
            return None
        # Of a tensor that is shared out, what is here.
        storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
        key = storage._cdata
        known = self._alive.get(key)
        size = storage.nbytes()
        if known is not None or not size:
            return known
        name = self._names.get(func)
        if name is None:
            name = self._names[func] = "" if func is None else str(func)
        module = self._modules[-1] if self._modules else ""
        born = _Storage(
            len(self._log), size, self._first_category(), self._phase, name, module,
            self._work == "forward" or bool(self._modules),
        )  # fmt: skip
        self._alive[key] = born
        self._references[key] = weakref.ref(storage, lambda _: self._die(key))
        self._log.append((born, True, self._phase, name))
        return born

    def _first_category(self) -> str:
        if self._in_loss:
            return "loss"
        if self._work == "backward" and not self._modules:
            node = torch._C._current_autograd_node()
            if node is not None and node.name() == LOSS_NODE:
                return "loss"
        return "temporaries"

    def follow_sizes(self) -> None:
        """Note what has become of storages that are given up, and taken again, by themselves."""
        if not self.recording:
            return
        for tensors in self.resized():
            storage = tensors[0].untyped_storage()
            known, there = storage._cdata in self._alive, storage.nbytes() > 0
            if known and not there:
                for tensor in tensors:
                    self._die(tensor.untyped_storage()._cdata)
            elif there and not known:
                self.label(tensors, "weights")

    def _die(self, key: int) -> None:
        storage = self._alive.pop(key, None)
        if storage is None:
            # Given up by its owner before.
            return
        del self._references[key]
        self._log.append((storage, False, self._phase, ""))

    # What it is told

    @contextmanager
    def phase(self, name: str, work: str = "") -> Iterator[None]:
        """Give what happens inside a name; work: "forward" or "backward" where it is one."""
        self._phase, self._work = name, work
        try:
            yield
        finally:
            self._work = ""

    def enter(self, phase: str) -> None:
        """Begin another phase in the middle of one."""
        self._phase = phase

    def label(self, tensors: Iterable[Tensor | None], category: str) -> None:
        """Say what storages are, from their births on; those not seen before are born now."""
        for tensor in tensors:
            storage = None if tensor is None else self._note(tensor)
            if storage is not None and RANK[category] < RANK[storage.category]:
                storage.category = category

    def label_saved(self) -> None:
        """Say that what the forward which just ended has left, and is nothing else, waits for the backward."""
        for storage in self._alive.values():
            if storage.phase == self._phase and storage.category == "temporaries":
                storage.category = "saved activations"

    @contextmanager
    def following(self, model: nn.Module) -> Iterator[None]:
        """Note which of the model's modules runs its forward meanwhile, and where its loss begins."""
        handles: list[RemovableHandle] = []
        for path, module in model.named_modules():
            if path:
                handles.append(module.register_forward_pre_hook(self._entering(path)))
                handles.append(module.register_forward_hook(self._leave, always_call=True))
        output = output_layer(model)
        if output is not None:
            handles.append(output.register_forward_pre_hook(self._begin_loss))
        handles.append(model.register_forward_hook(self._end_loss, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _entering(self, path: str) -> Callable[..., None]:
        return lambda *_: self._modules.append(path)

    def _leave(self, *_: Any) -> None:
        self._modules.pop()

    def _begin_loss(self, *_: Any) -> None:
        self._in_loss = True

    def _end_loss(self, *_: Any) -> None:
        self._in_loss = False

    def trace(self) -> Trace:
        """Return what was recorded so far."""
        return Trace(
            Event(
                storage.number, storage.bytes if born else -storage.bytes, storage.category, phase, operation,
                storage.module if born else "",
            )
            for storage, born, phase, operation in self._log
        )  # fmt: skip
