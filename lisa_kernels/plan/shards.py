"""A model whose weights ranks share out, rehearsed alone: FSDP2's own code, with nobody at the other ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lisa_kernels.distributed import settle, share_out, units_of
from lisa_kernels.layers import find_blocks
from lisa_kernels.plan.stand_ins import META

GATHERS, SCATTERS = "gathers weights", "scatters the gradients of shards"
# Told what is sent, and how many bytes of it all ranks have together.
Sent = Callable[[str, int], None]


def share_out_rehearsed(model: nn.Module, sent: Sent) -> None:
    """Share out a model without values, as `attach` finds it; what would travel is counted by `sent`."""
    share_out(model, find_blocks(model)[1], META)
    for unit in units_of(model):
        for group in unit._get_fsdp_state()._fsdp_param_groups:
            # Who trains on a device without values has forgotten something, and who rehearses has not.
            group._validate_no_meta_params = lambda: None  # type: ignore[method-assign]
        unit.set_custom_all_gather(_Counted(GATHERS, sent))  # type: ignore[arg-type]
        unit.set_custom_reduce_scatter(_Counted(SCATTERS, sent))  # type: ignore[arg-type]
    settle(model)


class GatheredWeights:
    """The tensors that weights are gathered into, whose storages FSDP gives up and takes again, a unit at once."""

    def __init__(self, model: nn.Module) -> None:
        self._units = [
            group.fsdp_params for unit in units_of(model) for group in unit._get_fsdp_state()._fsdp_param_groups
        ]
        self._known: list[list[Tensor]] = []

    def __call__(self) -> list[list[Tensor]]:
        """Return those of each unit that was gathered before."""
        if len(self._known) < len(self._units):
            made = [[getattr(param, "all_gather_outputs", None) or [] for param in unit] for unit in self._units]
            self._known = [[tensor for each in unit for tensor in each] for unit in made if all(unit)]
        return self._known


class _Counted:
    """A collective of FSDP's that makes the same tensors and sends nothing."""

    def __init__(self, what: str, sent: Sent) -> None:
        self._what, self._sent = what, sent

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a tensor to send from, or into."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, **_: Any) -> None:
        """Count the larger of the two, which is of all ranks."""
        self._sent(self._what, max(output_tensor.nbytes, input_tensor.nbytes))
