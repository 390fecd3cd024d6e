"""`lisa-kernels` as one of several ranks, which kills itself where a list of places says so, at each start another.

Called with the list as JSON before the command's own words: at start number i the rank [i][0] dies in the call [i][2]
of the place [i][1], and [i][3] seconds later.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import threading
from typing import Any

PLACES = {
    "forward": ("lisa_kernels.train.trainer", "FineTuneTrainer", "training_step"),
    "backward": ("lisa_kernels.distributed.reduction", "GradientReduction", "_end_of_backward"),
    "sum": ("lisa_kernels.distributed.ranks", "Ranks", "sum_"),
    "basis": ("lisa_kernels.basis.range_finder", None, "whitened_rows"),
    "step": ("lisa_kernels.methods.sampled_adamw", "SampledAdamW", "_take_step"),
    "switch": ("lisa_kernels.methods.sampled_adamw", "SampledAdamW", "_begin_period"),
    "comparison": ("lisa_kernels.distributed.ranks", "Ranks", "check_equal"),
    "save": ("lisa_kernels.train.trainer", "FineTuneTrainer", "_save_checkpoint"),
    "files": ("lisa_kernels.train.trainer", None, "save_tree"),
    "rows": ("lisa_kernels.methods.shared_folder", None, "write_together"),
    "rows in place": ("lisa_kernels.distributed.shard_files", None, "put_in_place"),
    "rows read": ("lisa_kernels.methods.shared_folder", None, "read_tensors"),
    "whole weights": ("lisa_kernels.train.finetune", None, "whole_state"),
    "begin": ("lisa_kernels.train.finetune", None, "start_run"),
    "last save": ("lisa_kernels.train.finetune", None, "save_weights"),
}


DEATH = "the test kills this rank here\n"


def die() -> None:
    """Say it, for the launcher names but one of two ranks that it finds ended, and end at once."""
    os.write(2, DEATH.encode())
    os.kill(os.getpid(), signal.SIGKILL)


def set_trap(place: str, call: int, seconds: float) -> None:
    module, owner, name = PLACES[place]
    found: Any = importlib.import_module(module)
    found = found if owner is None else getattr(found, owner)
    real, calls = getattr(found, name), 0

    def trapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and seconds:
            threading.Timer(seconds, die).start()
        elif calls == call:
            die()
        return real(*args, **kwargs)

    setattr(found, name, trapped)


def set_trap_in_training(*trap: Any) -> None:
    """Set the trap when training begins: a plan before it takes steps too."""
    from lisa_kernels.train.trainer import FineTuneTrainer

    real = FineTuneTrainer.train_on

    def train_on(self: Any, checkpoint: Any) -> None:
        set_trap(*trap)
        real(self, checkpoint)

    FineTuneTrainer.train_on = train_on


def main() -> int:
    from lisa_kernels import cli

    traps = json.loads(sys.argv[1])
    start = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if start < len(traps) and traps[start][0] == int(os.environ["RANK"]):
        if traps[start][1] == "begin":
            set_trap(*traps[start][1:])
        else:
            set_trap_in_training(*traps[start][1:])
    return cli.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
