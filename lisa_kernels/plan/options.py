"""From the options of `lisa-kernels finetune` to the workload that they are, and back to a command line."""

from __future__ import annotations

import dataclasses
import shlex
from typing import TYPE_CHECKING

from lisa_kernels.methods import Method
from lisa_kernels.methods.masters import IN_MEMORY
from lisa_kernels.plan.host import FILES
from lisa_kernels.plan.length import RunLength
from lisa_kernels.train.configs import check_sequence_length
from lisa_kernels.train.empty_model import empty_model
from lisa_kernels.train.finetune import build_method
from lisa_kernels.train.models import DTYPES, parse_dtype
from lisa_kernels.train.options import DEFAULT_STEPS, FineTuneOptions
from lisa_kernels.train.recomputation import checkpointed_blocks

if TYPE_CHECKING:
    from lisa_kernels.plan.data_rows import DataRows
    from lisa_kernels.plan.rehearsal import Workload

# Said even where they are the method's defaults: they are what decides the memory.
_ALWAYS_SAID = ("active_layers", "rank", "embeddings")
_SAID = (*_ALWAYS_SAID, "alpha", "targets", "master", "scores", "retired_state", "design")


def workload_of(
    options: FineTuneOptions, ranks: int = 1, data: DataRows | None = None, shard: bool = False
) -> Workload:  # fmt: skip
    """Return what a run with `options` puts into memory; defaults that depend on the model are settled on it.

    ranks: processes of which each has rows and micro-batches as the options say. data: the rows, where they are read.
    shard: the processes share the weights out.
    """
    from lisa_kernels.plan.rehearsal import Workload

    dtype = next(name for name, known in DTYPES.items() if known is parse_dtype(options.dtype))
    model = empty_model(options.model, dtype)
    check_sequence_length(model.config, options.seq_len)
    if options.period is None and options.taken:
        options = dataclasses.replace(options, period=options.taken.get("period"))
    method, recomputed = build_method(options, model), checkpointed_blocks(options, model)
    return Workload(
        options.model, method, batch_size=options.batch_size, seq_len=options.seq_len,
        accumulate=options.accumulate, dtype=dtype, gradient_checkpointing=recomputed != 0,
        checkpointed_blocks=recomputed or None,
        offload_activations=options.offload_activations,
        max_grad_norm=options.max_grad_norm or None, paging=options.paging, keep_logits=options.keep_logits,
        resting=options.resting, resting_where=options.resting_where, active_on=options.active_on,
        masters=_masters(options), seed=options.seed, steps=options.steps, epochs=options.epochs,
        length=RunLength.of(options, method, model), ranks=ranks, wire_dtype=options.wire_dtype, data=data, shard=shard,
    )  # fmt: skip


def _masters(options: FineTuneOptions) -> str | None:
    return options.masters if options.masters in (None, IN_MEMORY) else FILES


def finetune_command(workload: Workload, expandable: bool = False) -> str:
    """Return the command line of `workload` as a fine-tuning run, DATA and OUTPUT to be filled in.

    expandable: with the setting of torch's allocator that has it grow its segments.
    """
    flags = {
        "model": str(workload.model), "data": "DATA", "output": "OUTPUT", "method": workload.method.name,
        **_method_flags(workload), "batch-size": workload.batch_size * workload.ranks,
        "accumulate": workload.accumulate, "seq-len": workload.seq_len, "dtype": workload.dtype,
    }  # fmt: skip
    known = None if workload.length is None else workload.length.steps
    if workload.epochs is not None:
        flags["epochs"] = workload.epochs
    elif (steps := workload.steps or known) not in (None, DEFAULT_STEPS):
        flags["steps"] = steps
    if workload.max_grad_norm != FineTuneOptions.max_grad_norm:
        flags["max-grad-norm"] = workload.max_grad_norm or 0
    if workload.paging is not None:
        flags["paging"] = workload.paging
    if workload.resting is not None:
        flags["resting"] = workload.resting
    if workload.resting_where is not None:
        flags["resting-where"] = workload.resting_where
    if workload.masters is not None:
        flags["masters"] = workload.masters if workload.masters == IN_MEMORY else "FOLDER"
    if workload.active_on is not None:
        flags["active-on"] = workload.active_on
    if workload.wire_dtype is not None:
        flags["wire-dtype"] = workload.wire_dtype
    if workload.seed:
        flags["seed"] = workload.seed
    words = [f"--{name} {shlex.quote(str(value))}" for name, value in flags.items()]
    words.append("--gradient-checkpointing" if workload.gradient_checkpointing else "--no-gradient-checkpointing")
    if workload.checkpointed_blocks is not None:
        words[-1] += f" {workload.checkpointed_blocks}"
    if workload.offload_activations:
        words.append("--offload-activations")
    if workload.keep_logits:
        words.append("--keep-logits")
    if workload.shard:
        words.append("--shard")
    setting = "PYTORCH_ALLOC_CONF=expandable_segments:True "
    launcher = f"torchrun --nproc-per-node {workload.ranks} --no-python " if workload.ranks > 1 else ""
    return (setting if expandable else "") + launcher + " ".join(["lisa-kernels finetune", *words])


def _method_flags(workload: Workload) -> dict[str, object]:
    """Return the flags of a method's settings, those left out that are its defaults and say nothing of memory.

    A period is said unless it follows from the length of the run.
    """
    method: Method = workload.method
    default, flags = type(method)(), dict[str, object]()
    if workload.length is None and method.get("period", None) is not None:
        flags["period"] = method.get("period", None)
    for field in _SAID:
        value = method.get(field, None)
        if value is not None and (field in _ALWAYS_SAID or value != default.get(field, None)):
            flags[field.replace("_", "-")] = ",".join(value) if isinstance(value, tuple) else value
    return flags
