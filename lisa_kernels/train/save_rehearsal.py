"""What could make the last save fail, found before the first step."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from lisa_kernels.distributed.shards import local
from lisa_kernels.errors import InputError
from lisa_kernels.train.checkpoint import find_checkpoints
from lisa_kernels.train.options import FineTuneOptions
from lisa_kernels.train.run_folder import REHEARSAL

# What generation reads only where it samples.
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


def rehearse_saving(options: FineTuneOptions, model: Any, tokenizer: Any, console: Console) -> None:
    """Write all that the finished run will write but for the weights' bytes, count these, and leave nothing behind.

    A generation_config that asks for no sampling loses its settings of sampling, which transformers refuses to save
    and never reads. Raises InputError for what cannot be written and for a disk that is too small.
    """
    _without_idle_sampling(model, console)
    with _made(options.output):
        with _told(options.output), tempfile.TemporaryDirectory(prefix=REHEARSAL, dir=options.output) as folder:
            # One element of each tensor: what shares memory still does.
            thin = {name: local(value.detach()).reshape(-1)[:1] for name, value in model.state_dict().items()}
            model.save_pretrained(folder, state_dict=thin, save_original_format=False)
            tokenizer.save_pretrained(folder)
        check_space(options, model)


def _without_idle_sampling(model: Any, console: Console) -> None:
    config = getattr(model, "generation_config", None)
    if config is None or config.do_sample:
        return
    plain = type(config)()
    idle = [name for name in SAMPLING if getattr(config, name, None) != getattr(plain, name, None)]
    for name in idle:
        setattr(config, name, getattr(plain, name, None))
    if idle:
        console.print(
            f"note: the model's generation_config sets {', '.join(idle)} and do_sample=False, where they mean nothing; "
            "they are left out of the saved model.",
            highlight=False,
        )  # fmt: skip


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Have the folder for a while; what was not there before goes again."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise InputError(f"--output {folder} cannot be written ({error}); give another folder.") from error
    finally:
        for path in new:
            if path.exists():
                path.rmdir()


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"--output {folder} cannot be written ({error}); give another folder.") from error
    except (ValueError, TypeError, RuntimeError, AttributeError, NotImplementedError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise InputError(
            f"the model could not be saved at the end of the run ({type(error).__name__}: {reason}); mend it in the "
            "folder that --model names, and load it again."
        ) from error


def model_bytes(model: nn.Module) -> int:
    """Return what the model's weights take on a disk."""
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])


def run_bytes(options: FineTuneOptions, model: nn.Module) -> tuple[int, int, int]:
    """Return what a run will write: of the model, how many checkpoints, and of each of these."""
    whole = model_bytes(model)
    # Adapters are saved with the weights beneath them; moments, which are less than weights, are not counted.
    each = whole * (2 if options.build_method().form == "adapter" else 1)
    present = 0 if options.overwrite else len(find_checkpoints(options.output))
    # A new one is whole before an old one goes.
    checkpoints = max(0, options.max_checkpoints + 1 - present) if options.save_every else 0
    return whole, checkpoints, each


def check_space(options: FineTuneOptions, model: nn.Module) -> None:
    """Raise InputError where the disk has no room for what a run will write."""
    whole, checkpoints, each = run_bytes(options, model)
    wanted = whole + checkpoints * each
    free = shutil.disk_usage(options.output).free + (_held(options.output) if options.overwrite else 0)
    if free < wanted:
        kept = f" and {checkpoints} checkpoints of {each / 1e9:.2f} GB" if checkpoints else ""
        raise InputError(
            f"--output {options.output} has {free / 1e9:.2f} GB left, and this run writes a model of "
            f"{whole / 1e9:.2f} GB{kept}; give a folder on another disk"
            + (", a larger --save-every or fewer --max-checkpoints." if checkpoints else ".")
        )


def _held(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
