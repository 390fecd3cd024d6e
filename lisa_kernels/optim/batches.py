"""What one step updates, gathered into lists for the operations that take many tensors at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lisa_kernels.distributed.shards import first_element, local
from lisa_kernels.errors import InputError
from lisa_kernels.ops.adamw8 import Hyper, adamw8_, adamw8_op, adamw32_, adamw32_op, step_inputs
from lisa_kernels.ops.random_bits import key_base
from lisa_kernels.ops.tiles import to_device


class Kind(NamedTuple):
    """What the tensors of one batch have in common."""

    device: torch.device
    eight_bit: bool


class Batch:
    """The parameters of one step on one device with one kind of state, in the order of the groups.

    Of a parameter that is sharded, `params` and `grads` hold the rows that are here.
    """

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.params: list[Tensor] = []
        self.owners: list[Tensor] = []
        self.grads: list[Tensor] = []
        self.states: list[dict[str, Tensor]] = []
        # Each group's hyper-parameters and where its parameters end in the lists.
        self.groups: list[tuple[Hyper, int]] = []

    def update(self, scalars: Tensor, keys: Tensor, skip: Tensor, block_size: int, stochastic: bool) -> None:
        """Take the step: float32 [parameters, 8], int64 [parameters] and bool 0-d, as `step_inputs` makes them."""
        names = ("m_codes", "m_absmax", "v_codes", "v_absmax") if self.kind.eight_bit else ("m", "v")
        moments = [[state[name] for state in self.states] for name in names]
        starts = [first_element(owner) for owner in self.owners]
        parts = starts if any(starts) else None
        dense = all(map(Tensor.is_contiguous, self.params)) and all(map(Tensor.is_contiguous, self.grads))
        if self.kind.eight_bit and dense:
            adamw8_op(self.params, self.grads, *moments, scalars, keys, skip, block_size, stochastic, parts)
        elif self.kind.eight_bit:
            adamw8_(
                self.params, self.grads, *moments, scalars=scalars, keys=keys, skip=skip, block_size=block_size,
                stochastic=stochastic, starts=parts,
            )  # fmt: skip
        elif dense:
            adamw32_op(self.params, self.grads, *moments, scalars, keys, skip, stochastic, parts)
        else:
            adamw32_(
                self.params, self.grads, *moments, scalars=scalars, keys=keys, skip=skip, stochastic=stochastic,
                starts=parts,
            )  # fmt: skip
        # The operations run below autograd, which would not notice that weights in a graph have changed.
        torch.autograd.graph.increment_version(self.params)


def by_device(batches: Iterable[Batch]) -> dict[torch.device, list[Batch]]:
    """Return the batches of each device."""
    found: dict[torch.device, list[Batch]] = {}
    for batch in batches:
        found.setdefault(batch.kind.device, []).append(batch)
    return found


def inputs_of(
    batches: Sequence[Batch], took: Tensor, grad_scale: Tensor, bases: Tensor, clock: Tensor
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Count an update of all parameters in batches of one device; returns their scalars and keys, one after the other.

    took: int64 0-d, 1, or 0 for a skipped step; the others as for `step_inputs`.
    """
    steps = [state["step"] for batch in batches for state in batch.states]
    torch._foreach_add_(steps, [took] * len(steps))
    groups: list[tuple[Hyper, int]] = []
    for batch in batches:
        before = groups[-1][1] if groups else 0
        groups += [(hyper, before + end) for hyper, end in batch.groups]
    return step_inputs(steps, groups, grad_scale, bases, clock)


def _hyper(group: dict[str, Any]) -> Hyper:
    beta1, beta2 = group["betas"]
    return Hyper(group["lr"], beta1, beta2, group["eps"], group["weight_decay"])


def with_gradients(params: Iterable[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return those that a step moves, each with its gradient; InputError where one is sparse or on another device."""
    moving = [(param, param.grad) for param in params if param.grad is not None and param.numel()]
    for param, grad in moving:
        if grad.layout is not torch.strided or grad.device != param.device:
            _refuse(param, grad)
    return moving


def gather(param_groups: Iterable[dict[str, Any]], state_of: Callable[[Tensor], dict[str, Tensor]]) -> list[Batch]:
    """Return batches of all parameters that have a gradient.

    InputError where one is sparse or on another device, before `state_of` has made any state.
    """
    moving = [(_hyper(group), with_gradients(group["params"])) for group in param_groups]
    batches: dict[tuple[torch.device, bool], Batch] = {}
    for hyper, pairs in moving:
        for param, grad in pairs:
            state = state_of(param)
            kind = param.device, "m_codes" in state
            batch = batches.get(kind)
            if batch is None:
                batch = batches[kind] = Batch(Kind(*kind))
            batch.params.append(local(param))
            batch.owners.append(param)
            batch.grads.append(local(grad))
            batch.states.append(state)
        for batch in batches.values():
            if len(batch.params) > (batch.groups[-1][1] if batch.groups else 0):
                batch.groups.append((hyper, len(batch.params)))
    return list(batches.values())


def _refuse(param: Tensor, grad: Tensor) -> None:
    if grad.layout is not torch.strided:
        raise InputError(
            "a gradient is sparse; AdamW8bit takes dense gradients: build the embedding with sparse=False."
        )
    raise InputError(
        f"a gradient is on {grad.device} and its parameter on {param.device}; move the model before its backward pass."
    )


def key_bases(device: torch.device, seed: int, indices: Iterable[int]) -> Tensor:
    """Return the part of parameters' random keys that does not change, int64 [parameters], without waiting."""
    bases = torch.tensor([key_base(seed, index) for index in indices], dtype=torch.int64, device="cpu")
    return to_device(bases, device)


class KeyBases:
    """The part of many parameters' random keys that does not change with the step, kept from step to step."""

    def __init__(self) -> None:
        # Layers come and go: only as many sets are kept as are in use.
        self.sets = 8
        self._bases: dict[tuple[torch.device, int, tuple[int, ...]], Tensor] = {}

    def on(self, device: torch.device, seed: int, indices: tuple[int, ...]) -> Tensor:
        """Return int64 [parameters] on `device`, without waiting for it."""
        which = (device, seed, indices)
        if which not in self._bases:
            while len(self._bases) >= self.sets:
                del self._bases[next(iter(self._bases))]
            self._bases[which] = key_bases(device, seed, indices)
        return self._bases[which]
