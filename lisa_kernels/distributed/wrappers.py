"""Refuse the wrappers that share out or reduce gradients on their own, each with the reason and what works instead."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from lisa_kernels.errors import InputError

WORKS = "attach and call the bare model on every rank: the optimizer that attach returns averages gradients itself."

REPLACED = (
    "FullyShardedDataParallel, DeepSpeed and their like put tensors of their own in the place of parameters, and "
    f"cannot follow a set that changes; {WORKS}"
)


def check_not_wrapped(model: nn.Module) -> None:
    """Raise InputError for a model that is, or holds, a wrapper which fixes the set of gradients once."""
    for path, module in model.named_modules():
        if isinstance(module, (DistributedDataParallel, DataParallel)):
            raise InputError(
                f"{_named(path)} is wrapped in {type(module).__name__}, which fixes the set of gradients once and "
                f"fails after the first switch; {WORKS}"
            )
    if type(model).__module__.partition(".")[0] == "deepspeed" or any(hasattr(p, "ds_id") for p in model.parameters()):
        raise InputError(
            "the model is under DeepSpeed ZeRO, which flattens parameters at initialisation and cannot follow a "
            f"changing set; {WORKS}"
        )


def leave_gradients_alone() -> None:
    """Tell the DDP that is calling a model, if one is, that its gradients are none of its business.

    As under its `no_sync`, for good: trainers wrap models in DDP whatever else reduces gradients.
    """
    caller = DistributedDataParallel._get_active_ddp_module()
    if caller is not None:
        caller.require_backward_grad_sync = False


def check_not_shared_out(model: nn.Module, sharded: bool = False) -> None:
    """Raise InputError for a model of which each process holds a part, or whose gradients the DDP around it reduces.

    Asked at every training forward too, for wrappers come after attaching as well. sharded: the model was under
    fully_shard (FSDP2) when it was attached, and is known to be as it should.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    caller = DistributedDataParallel._get_active_ddp_module()
    if caller is not None and caller.require_backward_grad_sync:
        raise InputError(
            "the attached model is called by DistributedDataParallel, which reduces the gradients that there were when "
            f"it was made, and no others after a switch: ranks would drift apart; {WORKS}"
        )
    for path, module in model.named_modules():
        if isinstance(module, FullyShardedDataParallel):
            raise InputError(
                f"{_named(path)} is wrapped in FullyShardedDataParallel, which flattens parameters into one tensor and "
                f"cannot train a part of it; {WORKS}"
            )
        if isinstance(module, FSDPModule) and not sharded:
            raise InputError(
                f"{_named(path)} was put under fully_shard (FSDP2) after the model was attached, which replaced the "
                "parameters that are trained; call fully_shard first and attach then."
            )
    if sharded:
        return
    for name, param in model.named_parameters():
        if isinstance(param, DTensor):
            raise InputError(
                f"{name} is a DTensor, of which each process holds a part (tensor parallelism); its gradient's basis "
                f"would be of that part alone; {WORKS}"
            )


def _named(path: str) -> str:
    return path or "the model"
