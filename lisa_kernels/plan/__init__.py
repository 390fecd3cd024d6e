"""Peak memory of a run, known before it starts: the real step, rehearsed on tensors without storage."""

from __future__ import annotations

import os
from typing import Any

from lisa_kernels.methods import Method
from lisa_kernels.plan.result import Plan

__all__ = ["Plan", "plan"]


def plan(
    model: Any, method: Method, *, batch_size: int = 1, seq_len: int = 1024, accumulate: int = 1, dtype: str = "bf16",
    gradient_checkpointing: bool | int = True, offload_activations: bool = False, max_grad_norm: float | None = 1.0,
    block_size: int = 256, paging: str | None = None, keep_logits: bool = False, seed: int = 0,
    resting: str | None = None, resting_where: str | os.PathLike[str] | None = None, active_on: str | None = None,
    masters: str | None = None,
) -> Plan:  # fmt: skip
    """Rehearse attaching `method` to `model` and training a few steps with it, and return the memory that it takes.

    model: preset:NAME, a directory with a config.json, the path of one, or a transformers config; weights are neither
    read nor made. dtype: fp32, bf16 or fp16, of the weights. gradient_checkpointing: whether activations are
    recomputed, or in how many blocks, see `checkpoint_blocks`. The steps rehearsed hold `accumulate` batches of
    `batch_size` rows of `seq_len` tokens, a switch of layers and a refresh of bases. Methods that draw layers by scores
    draw any here. resting, resting_where (a folder need not be there), active_on: see `attach`; weights are then taken
    to reach the device at rest, loaded and attached on the host. masters: "host" or "files", which decides no bytes of
    the device: see `Plan.host`.
    Raises InputError for what a run would refuse.
    """
    from lisa_kernels.plan.gpu_memory import GpuMemory
    from lisa_kernels.plan.rehearsal import Workload, rehearse

    where = None if resting_where is None else os.fspath(resting_where)
    workload = Workload(
        model, method, batch_size=batch_size, seq_len=seq_len, accumulate=accumulate, dtype=dtype,
        gradient_checkpointing=gradient_checkpointing is not False, offload_activations=offload_activations,
        max_grad_norm=max_grad_norm, block_size=block_size, paging=paging, keep_logits=keep_logits, seed=seed,
        resting=resting, resting_where=where, active_on=active_on, masters=masters,
        checkpointed_blocks=None if isinstance(gradient_checkpointing, bool) else gradient_checkpointing,
    )  # fmt: skip
    return Plan(workload, rehearse(workload, gpu=GpuMemory.here()))
