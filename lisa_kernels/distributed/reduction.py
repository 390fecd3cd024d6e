"""Gradients of what trains now, averaged over the ranks at the end of each backward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lisa_kernels.distributed.ranks import Ranks
from lisa_kernels.errors import InputError

WIRE_DTYPES = {"bf16": torch.bfloat16}
# Bytes that are copied together to travel: all that trains of most methods, and a bound for the others.
PORTION_BYTES = 1 << 28


def check_wire_dtype(name: str | None) -> torch.dtype | None:
    """Return the dtype of gradients on their way, None for their own. Raises InputError for an unknown name."""
    if name is not None and name not in WIRE_DTYPES:
        raise InputError(f'wire_dtype is {name!r}; None (as gradients are) or "bf16" is wanted.')
    return None if name is None else WIRE_DTYPES[name]


class GradientReduction:
    """Hooks that average gradients over ranks once a backward is through, before anyone reads them.

    Accumulated gradients are averaged again and come out the same, for the average is linear; under `no_sync` none
    travels. wire_dtype: what gradients are rounded to on their way, None for their own dtype.

    Bytes: a copy of the gradients, `PORTION_BYTES` at a time.
    """

    def __init__(self, ranks: Ranks, wire_dtype: torch.dtype | None = None) -> None:
        self.ranks, self.wire_dtype = ranks, wire_dtype
        self._handles: dict[nn.Parameter, Any] = {}
        self._queued = self._suspended = self._unsent = False
        # Which step this is, as its optimizer counts, and how often its gradients were averaged.
        self.step, self._times = 0, 0

    def follow(self, params: Iterable[nn.Parameter]) -> None:
        """Average the gradients of exactly these parameters from now on, in this order, the same on all ranks."""
        wanted = dict.fromkeys(params)
        for param in [param for param in self._handles if param not in wanted]:
            self._handles.pop(param).remove()
        known = self._handles
        self._handles = {
            param: known.get(param) or param.register_post_accumulate_grad_hook(self._arrived) for param in wanted
        }

    def remove(self) -> None:
        """Take the hooks off, and leave the ranks."""
        self.follow(())
        self.ranks.close()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Let gradients add up on each rank; a backward outside averages all of them."""
        before, self._suspended = self._suspended, True
        try:
            yield
        finally:
            self._suspended = before

    def _arrived(self, param: Tensor) -> None:
        if self._suspended:
            self._unsent = True
        elif not self._queued:
            self._queued = True
            # Of this backward: it runs when all gradients are there, on the stream of the caller.
            torch.autograd.Variable._execution_engine.queue_callback(self._end_of_backward)  # type: ignore[attr-defined]

    def _end_of_backward(self) -> None:
        self._queued = False
        self.average()

    @torch.no_grad()
    def average(self) -> None:
        """Replace each gradient by its mean over ranks, one that a rank does not have counting as zeros."""
        self._times += 1
        self._unsent = False
        self.ranks.meet(f"averages the gradients of step {self.step} (time {self._times})")
        params = list(self._handles)
        there = self.ranks.any_has([param.grad is not None for param in params])
        grads = [_gradient(param) for param, known in zip(params, there) if known]
        for some in self._portions(grads):
            self._average(some)

    def _portions(self, grads: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """Yield gradients of one dtype on the way and one device, as many as `PORTION_BYTES` holds."""
        kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for grad in grads:
            kinds.setdefault((self.wire_dtype or grad.dtype, grad.device), []).append(grad)
        for (dtype, _), members in kinds.items():
            portion, held = list[Tensor](), 0
            for grad in members:
                size = grad.numel() * dtype.itemsize
                if portion and held + size > PORTION_BYTES:
                    yield portion
                    portion, held = [], 0
                portion.append(grad)
                held += size
            yield portion

    def _average(self, grads: Sequence[Tensor]) -> None:
        sizes = [grad.numel() for grad in grads]
        flat = torch.empty(sum(sizes), dtype=self.wire_dtype or grads[0].dtype, device=grads[0].device)
        parts = flat.split(sizes)
        for grad, part in zip(grads, parts):
            # Divided before the sum, which would leave float16 otherwise.
            torch.div(grad.flatten(), self.ranks.count, out=part)
        self.ranks.sum_(flat)
        for grad, mean in zip(grads, parts):
            grad.copy_(mean.view_as(grad))

    def before_step(self) -> None:
        """See to it that the step that begins uses gradients that all ranks share. Raises InputError if it cannot."""
        if self._unsent:
            raise InputError(
                "the last backward before step() was under no_sync(): its gradients are this rank's own; leave the "
                "last micro-batch of each step out of no_sync()."
            )
        if not self._times:
            # No backward of this rank reached what trains, or its gradients were made by hand.
            self.average()
        self._times = 0


def _gradient(param: nn.Parameter) -> Tensor:
    if param.grad is None:
        param.grad = torch.zeros_like(param)
    return param.grad
