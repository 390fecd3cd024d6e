"""Models under `fully_shard` (FSDP2): whether all of one is, and what its units must do when what trains changes.

Between a unit's forward and backward its modules hold whole weights in the place of the shards; the optimizer's
parameters are the shards. Gradients of these are averaged by FSDP itself.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn

from lisa_kernels.distributed.ranks import Ranks
from lisa_kernels.distributed.shards import check_cut, check_placement, group_of_shards, is_sharded
from lisa_kernels.errors import InputError

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

# Elements that share a hash of random numbers.
FOUR = 4


def units_of(model: nn.Module) -> list[FSDPModule]:
    """Return the modules whose weights travel together, the outermost first."""
    home = sys.modules.get("torch.distributed.fsdp")
    return [] if home is None else [module for module in model.modules() if isinstance(module, home.FSDPModule)]


def share_out(model: nn.Module, blocks: Iterable[nn.Module], device: torch.device) -> None:
    """Give each rank of the default group its rows of every weight, block by block, to compute on `device`.

    All ranks call it, with the same weights; wherever these are, no more than a block's are whole on the device.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    # What is no parameter stays on each rank whole.
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)


def whole_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the state of a model whose rows ranks share, whole and in host memory, on rank 0; {} on the others."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    at_rest(model)
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))  # type: ignore[return-value]


def is_unit(module: nn.Module) -> bool:
    """Return whether `fully_shard` was called on this very module."""
    home = sys.modules.get("torch.distributed.fsdp")
    return home is not None and isinstance(module, home.FSDPModule)


def at_rest(model: nn.Module) -> None:
    """Have shards where whole weights are, in all units: what is gathered next trains as the shards do then."""
    for unit in units_of(model):
        unit.reshard()


@contextmanager
def gradients_at_home(model: nn.Module) -> Iterator[None]:
    """Let the gradients of backwards inside add up on each rank, whole; one outside averages all of them."""
    units = units_of(model)
    try:
        for unit in units:
            unit.set_requires_gradient_sync(False, recurse=False)
        yield
    finally:
        for unit in units:
            unit.set_requires_gradient_sync(True, recurse=False)


def check_sent(model: nn.Module) -> None:
    """Raise InputError where gradients of the last backward are still this rank's own: a step would go without them."""
    for unit in units_of(model):
        for group in unit._get_fsdp_state()._fsdp_param_groups:
            for param in group.fsdp_params:
                gathered = getattr(param, "_unsharded_param", None)
                if param.unsharded_accumulated_grad is not None or (gathered is not None and gathered.grad is not None):
                    raise InputError(
                        "the last backward before step() was under no_sync() or set_requires_gradient_sync(False): its "
                        "gradients are this rank's own; leave the last micro-batch of each step out of it."
                    )


def settle(model: nn.Module) -> None:
    """Have FSDP note the dtypes of gradients now, where all trains that ever will.

    It does so before a model's first forward, and of frozen parameters it notes none: layers that train later would
    get gradients of another dtype, or in that of the weights on their way. See pytorch/pytorch#186998.
    """
    for unit in units_of(model):
        state = unit._get_fsdp_state()
        state._lazy_init()
        for group in state._fsdp_param_groups:
            group.lazy_init()


def check_fully_sharded(model: nn.Module, ranks: Ranks | None) -> None:
    """Raise InputError unless all of the model is shared out among `ranks`, row by row, as one that can be trained."""
    if ranks is None:
        raise InputError(
            "the model is under fully_shard (FSDP2), and its ranks have to agree on what they train: attach with "
            'ranks="auto", in a process group of several processes.'
        )
    if not is_unit(model):
        raise InputError(
            "parts of the model are under fully_shard (FSDP2) and the model itself is not; call fully_shard on each "
            "block and then on the model, and attach that."
        )
    for unit in units_of(model):
        if any(group.gradient_divide_factor is not None for group in unit._get_fsdp_state()._fsdp_param_groups):
            raise InputError(
                "gradients of the shards are divided by a factor of their own (set_gradient_divide_factor), and those "
                "of slots by the number of ranks; leave the factor out."
            )
    for name, param in model.named_parameters():
        if not is_sharded(param):
            raise InputError(
                f"{name} is on every rank whole, where the rest of the model is under fully_shard (FSDP2); shard all "
                "of it, without ignored_params."
            )
        check_placement(name, param)
        holders = dist.get_process_group_ranks(group_of_shards(param))
        if sorted(holders) != sorted(dist.get_process_group_ranks(ranks.group)):
            raise InputError(
                f"{name} is shared out among the ranks {holders}, and others train together "
                f"({dist.get_process_group_ranks(ranks.group)}); use one mesh of all ranks."
            )
        if param.dtype != torch.float32:
            check_cut(name, param, FOUR, "fours", "use another number of ranks, or float32 weights.")
