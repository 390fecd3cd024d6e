"""A run before its optimizer: its folder, settings, rows, model and plan, on one process or several."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lisa_kernels.distributed import Ranks, on_first, together
from lisa_kernels.methods.resting import ON_DEVICE, ON_HOST
from lisa_kernels.paging.page_file import checked_folder
from lisa_kernels.train.master_files import choose_masters
from lisa_kernels.train.memory import MemoryMeter, PlannedMemory, planned_memory
from lisa_kernels.train.options import FineTuneOptions
from lisa_kernels.train.placement import Memory, check_room, settled_dtype
from lisa_kernels.train.prepare import load_model_for, read_data
from lisa_kernels.train.rank_rows import share_of_rank
from lisa_kernels.train.recomputation import settle_recomputation
from lisa_kernels.train.reporters import check_reporters
from lisa_kernels.train.run_folder import open_run
from lisa_kernels.train.save_rehearsal import rehearse_saving
from lisa_kernels.train.sharded import check_shard
from lisa_kernels.train.tokenize import TokenizedData


@dataclasses.dataclass
class PreparedRun:
    """A run before its optimizer: what was found in its folder, its settings, data, model and memory."""

    facts: dict[str, Any]
    checkpoint: Path | None
    settled: FineTuneOptions
    dtype: str
    tokenizer: Any
    model: Any
    train: TokenizedData
    held_out: TokenizedData
    plan: PlannedMemory | None
    meter: MemoryMeter

    @property
    def planned_bytes(self) -> int | None:
        """The peak by plan."""
        return None if self.plan is None else self.plan.peak_bytes


def prepare_run(
    options: FineTuneOptions, device: torch.device, console: Console,
    plan: Callable[..., PlannedMemory] | None, ranks: Ranks | None,
) -> PreparedRun:  # fmt: skip
    """Read and load all that a run needs; a mistake in what was given shows before anything is changed."""
    check_reporters(options)
    if options.resting_where not in (None, ON_DEVICE, ON_HOST):
        checked_folder(options.resting_where)
    facts, checkpoint = on_first(ranks, lambda: open_run(options))
    with together(ranks):
        # What a mistake may be in comes before what takes long.
        dtype = settled_dtype(options, facts, device)
        settled = dataclasses.replace(options, dtype=dtype)
        if options.shard:
            check_shard(settled, ranks)
        if ranks is not None:
            rows, times = share_of_rank(options.batch_size, options.accumulate, ranks.count)
            settled = dataclasses.replace(settled, batch_size=rows, accumulate=times)
            plan = None if plan is None else functools.partial(plan, ranks=ranks.count)
        data = read_data(options, console)
        settled = choose_masters(settled, console)
        plan = None if plan is None else functools.partial(plan, data=data)
    settled, plan_of_run = _planned(ranks, settled, plan, device, console)
    with together(ranks):
        if device.type == "cuda" and plan_of_run is not None:
            check_room(plan_of_run.peak_bytes, Memory.of(device), device)
        meter = MemoryMeter.start(device)
        model, train, held_out = load_model_for(settled, data, device, console)
    if plan is not None and data.expected_to_share(model) and train is data.train:
        # The plan was of rows that examples share.
        alone = functools.partial(plan, data=dataclasses.replace(data, may_pack=False))
        _, plan_of_run = _planned(ranks, settled, alone, device, console)
    on_first(ranks, lambda: rehearse_saving(options, model, data.tokenizer, console))
    return PreparedRun(
        facts, checkpoint, settled, dtype, data.tokenizer, model, train, held_out, plan_of_run, meter
    )  # fmt: skip


def _planned(
    ranks: Ranks | None, options: FineTuneOptions, plan: Callable[..., PlannedMemory] | None, device: torch.device,
    console: Console,
) -> tuple[FineTuneOptions, PlannedMemory | None]:  # fmt: skip
    """Return the options with what memory decides, and the plan of the run, each rank its own.

    Of ranks that share the weights out the first makes it for all: none holds more, and all must do the same.
    """

    def find() -> tuple[FineTuneOptions, PlannedMemory | None]:
        settled = settle_recomputation(options, plan, device, console)
        if plan is None:
            return settled, None
        return settled, planned_memory(
            settled, plan if ranks is None else functools.partial(plan, travels=True), console
        )

    if options.shard:
        return on_first(ranks, find)
    with together(ranks):
        return find()
