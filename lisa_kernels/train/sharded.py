"""What a run whose processes share its weights out (`--shard`) needs, and what it cannot do."""

from __future__ import annotations

from lisa_kernels.distributed import Ranks
from lisa_kernels.errors import InputError
from lisa_kernels.train.options import FineTuneOptions
from lisa_kernels.train.run_folder import RUN_FILE


def check_shard(options: FineTuneOptions, ranks: Ranks | None) -> None:
    """Raise InputError where there is nobody to share with, and for settings that no shards are trained with."""
    if ranks is None:
        raise InputError(
            "--shard shares the weights out among several processes, and this is a single one; start them by torchrun, "
            "or leave --shard out."
        )
    if options.dtype == "fp16":
        raise InputError(
            "--shard is given with --dtype fp16, whose loss is scaled, and gradients of shards and of slots cannot be "
            "scaled together; use --dtype bf16 or fp32."
        )
    if options.samples:
        raise InputError(
            f"--samples {options.samples} is given with --shard, where no process has the model that would answer; "
            "leave it out."
        )


def check_disk(options: FineTuneOptions, ranks: Ranks) -> None:
    """Raise InputError on all ranks unless they see one disk: each writes its rows into the checkpoints there."""
    run_file = options.output / RUN_FILE
    seen = ranks.tell(run_file.read_text() if run_file.is_file() else None)
    other = next((rank for rank, text in enumerate(seen) if text != seen[0]), None)
    if other is not None:
        raise InputError(
            f"--shard has each process write its rows into --output {options.output}, which is on another disk for "
            f"rank {other} than for rank 0; give a folder on a disk that all machines share."
        )
