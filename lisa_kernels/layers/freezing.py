"""Keep frozen what is frozen, and refuse the settings under which layer sampling cannot work."""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lisa_kernels.distributed import REPLACED, Sharing, at_rest, check_not_shared_out, process_count, units_of
from lisa_kernels.errors import InputError
from lisa_kernels.layers.slot import SlotModule
from lisa_kernels.uncompiled import uncompiled

CHANGE_ADVICE = "call detach() on its optimizer, change the model, and attach it again."
REPLICA_ADVICE = (
    "a replica of an attached model cannot train: torch's DataParallel makes one a GPU, and transformers' Trainer "
    "wraps models in it wherever it sees several GPUs; let the program see one: start it with CUDA_VISIBLE_DEVICES=0."
)
COPY_ADVICE = "copy the model after detach(), or load its state_dict() into a model that was never attached."


def _advice(alone: str) -> str:
    """Return what to do about changed parameters: of several processes it is a wrapper that has changed them."""
    return alone if process_count() == 1 else REPLACED


def replica_advice() -> str:
    """Return why something that shares the model's layers and hooks cannot train."""
    return _advice(REPLICA_ADVICE)


@dataclass
class Known:
    """A parameter as it was when the model was attached; a slot's shape changes, and the device is the first step's."""

    name: str
    shape: torch.Size | None
    dtype: torch.dtype
    device: torch.device | None = None

    def change(self, name: str, param: nn.Parameter) -> str | None:
        """Return what has changed, None if nothing has."""
        if name != self.name:
            return f"the parameter {name} was {self.name}"
        if self.shape is not None and param.shape != self.shape:
            return f"{name} is {list(param.shape)} and was {list(self.shape)}"
        if param.dtype != self.dtype:
            return f"{name} holds {param.dtype} and held {self.dtype}"
        self.device = self.device or param.device
        return None if param.device == self.device else f"{name} is on {param.device} and was on {self.device}"


class FreezeGuard:
    """A forward pre-hook that restores `requires_grad` before each graph is built, and knows the model again.

    Trainers, gradient checkpointing and user code switch gradients on behind a sampler's back; memory then creeps back
    to full fine-tuning without a word. The guard puts the flags right, says so once, and removes the hook that
    Hugging Face's gradient checkpointing puts on the embeddings (with it every frozen layer stays in the graph).
    Parameters that come, go or change after the model was attached would train wrongly or not at all: it refuses them.
    It refuses as well what shares the model's hooks and is not the model: a replica.

    sharing: who sees to it that several processes do the same.
    """

    def __init__(self, model: nn.Module, sharing: Sharing = Sharing.BY_CALLER) -> None:
        self._model, self._sharing = weakref.ref(model), sharing
        self.before = {name: param.requires_grad for name, param in model.named_parameters()}
        slots = {module.slot for module in model.modules() if isinstance(module, SlotModule)}
        self._known = {
            param: Known(name, None if param in slots else param.shape, param.dtype)
            for name, param in model.named_parameters()
        }
        self.trainable: set[nn.Parameter] = set()
        self._warned = False
        self._sharded = bool(units_of(model))
        # First, so that FSDP2 gathers what trains now.
        self._handle = model.register_forward_pre_hook(self, prepend=True)

    @uncompiled
    def __call__(self, model: nn.Module, args: Any) -> None:
        """Check the model, as a forward pre-hook is called; never part of a compiled graph."""
        if model is not self._model():
            raise InputError(replica_advice())
        check_checkpointing(model)
        drop_input_gradients(model)
        self._rest(model)
        if model.training and torch.is_grad_enabled():
            self._sharing.check()
            check_not_shared_out(model, self._sharded)
            self.check_unchanged(model)
        self.enforce(model)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Leave a `CopyNotice` in copies and pickles of the model, whose flags are their owner's."""
        return CopyNotice, ()

    def _rest(self, model: nn.Module) -> None:
        """Have shards where their whole weights may still be: they are the parameters that are known here."""
        if self._sharded:
            at_rest(model)

    def let_move(self, params: Iterable[nn.Parameter]) -> None:
        """Take it that these parameters are on another device from now on."""
        for param in params:
            self._known[param].device = None

    def set_trainable(self, model: nn.Module, params: Iterable[nn.Parameter]) -> None:
        """Make exactly these parameters require gradients; the others lose theirs."""
        self._rest(model)
        self.trainable = set(params)
        for param in model.parameters():
            wanted = param in self.trainable
            param.requires_grad_(wanted)
            if not wanted:
                param.grad = None

    def check_unchanged(self, model: nn.Module) -> None:
        """Raise InputError unless the model has the parameters with which it was attached, as they were."""
        self._rest(model)
        found = dict(model.named_parameters())
        for name, param in found.items():
            known = self._known.get(param)
            if known is None:
                replaced = any(name == each.name for each in self._known.values())
                change: str | None = f"{name} is {'another parameter than' if replaced else 'new, it was not there'}"
            else:
                change = known.change(name, param)
            if change is not None:
                raise InputError(f"{change} when the model was attached; {_advice(CHANGE_ADVICE)}")
        if len(found) < len(self._known):
            gone = next(known.name for known in self._known.values() if known.name not in found)
            raise InputError(f"{gone} is gone from the model since it was attached; {_advice(CHANGE_ADVICE)}")

    def enforce(self, model: nn.Module) -> None:
        """Put right every parameter whose `requires_grad` was changed by someone else; warns once."""
        changed = []
        for name, param in model.named_parameters():
            # What came later is not of this model, which trains no more.
            if param not in self._known:
                continue
            wanted = param in self.trainable
            if param.requires_grad != wanted:
                param.requires_grad_(wanted)
                changed.append(name)
            if not wanted and param.grad is not None:
                param.grad = None
        if changed and not self._warned:
            self._warned = True
            warnings.warn(
                f"requires_grad of {len(changed)} parameters (first: {changed[0]}) was changed outside the sampler; it "
                "is put back before every forward. Do not freeze or unfreeze parameters of an attached model.",
                stacklevel=2,
            )

    def remove(self, model: nn.Module) -> None:
        """Take the hook off and give every parameter the flag it had before."""
        self._handle.remove()
        self._rest(model)
        for name, param in model.named_parameters():
            param.requires_grad_(self.before.get(name, param.requires_grad))


class CopyNotice:
    """The forward pre-hook of a copy of an attached model: it computes and is saved as any model is, and cannot train.

    Its slots have no optimizer that would fold them. Says so once, when a training forward builds a graph.
    """

    def __init__(self) -> None:
        self._warned = False

    @uncompiled
    def __call__(self, model: nn.Module, args: Any) -> None:
        """Look at the model, as a forward pre-hook is called."""
        trains = model.training and torch.is_grad_enabled() and any(param.requires_grad for param in model.parameters())
        if trains and not self._warned:
            self._warned = True
            warnings.warn(f"this model is a copy of an attached one, which cannot train; {COPY_ADVICE}", stacklevel=2)


def is_attached(model: nn.Module) -> bool:
    """Return whether a guard is on the model or on a part of it."""
    return any(isinstance(hook, FreezeGuard) for part in model.modules() for hook in part._forward_pre_hooks.values())


def is_copy(model: nn.Module) -> bool:
    """Return whether the model, or a part of it, was copied while it was attached."""
    return any(isinstance(hook, CopyNotice) for part in model.modules() for hook in part._forward_pre_hooks.values())


def check_checkpointing(model: nn.Module) -> None:
    """Refuse re-entrant gradient checkpointing."""
    for module in model.modules():
        if not getattr(module, "gradient_checkpointing", False):
            continue
        function = getattr(module, "_gradient_checkpointing_func", None)
        # torch's own default is re-entrant, so only an explicit False is safe.
        if isinstance(function, functools.partial) and function.keywords.get("use_reentrant") is not False:
            raise InputError(
                "gradient checkpointing is re-entrant: its lowest active layer would get no gradient while the layers "
                "below are frozen; use "
                'gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False}).'
            )


def drop_input_gradients(model: nn.Module) -> None:
    """Remove the hooks that make embeddings' outputs require gradients, whoever installed them and however often."""
    if getattr(model, "_require_grads_hooks", None) or getattr(model, "_require_grads_hook", None) is not None:
        model.disable_input_require_grads()  # type: ignore[operator]
    # Enabling gradient checkpointing twice leaves a hook that no handle reaches; transformers and peft name it alike.
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__name__", "").startswith("make_inputs_require_grad"):
                del module._forward_hooks[key]
