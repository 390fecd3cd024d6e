"""Notice that another optimizer steps an attached model: no layer would be switched then, and no slot folded."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lisa_kernels.distributed import REPLACED
from lisa_kernels.errors import InputError


class ForeignSteps:
    """A hook on all optimizers that refuses steps on the parameters of `owner` by anyone else, until it is removed.

    Trainers make an optimizer of their own where none is handed to them, and a loop may go on with an older one. Steps
    of `owner` itself are refused where its groups hold other parameters by now.
    """

    def __init__(self, owner: Optimizer) -> None:
        self._owner = weakref.ref(owner)
        self._params = {id(param) for group in owner.param_groups for param in group["params"]}
        self._handle = register_optimizer_step_pre_hook(self)
        weakref.finalize(owner, self._handle.remove)

    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Check an optimizer that is about to step."""
        owner = self._owner()
        if optimizer is owner:
            self._check_groups(optimizer)
        if owner is None or optimizer is owner or getattr(optimizer, "optimizer", None) is owner:
            return
        if any(self._moves(param) for group in optimizer.param_groups for param in group["params"]):
            raise InputError(
                f"{type(optimizer).__name__} is about to step parameters of an attached model; only the optimizer that "
                "attach returned switches layers and folds what was learnt. Hand it over (a Trainer takes "
                "optimizers=(optimizer, None)), or call detach() on it first."
            )

    def _check_groups(self, owner: Optimizer) -> None:
        strange = [
            group.get("name", number)
            for number, group in enumerate(owner.param_groups)
            if not self._params.issuperset(map(id, group["params"]))
        ]
        if strange:
            raise InputError(
                f"the parameters in group {strange[0]!r} of the optimizer are others than those that attach put there; "
                f"{REPLACED}"
            )

    def _moves(self, param: Tensor) -> bool:
        return id(param) in self._params and param.grad is not None

    def remove(self) -> None:
        """Take the hook off."""
        self._handle.remove()
