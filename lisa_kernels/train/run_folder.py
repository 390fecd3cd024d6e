"""The folder of one run: whose it is, what it holds, and how the finished model gets there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from lisa_kernels.errors import InputError
from lisa_kernels.files import written_whole
from lisa_kernels.paging.masters import is_left_by_a_run
from lisa_kernels.train.checkpoint import find_checkpoints, remove_leftovers
from lisa_kernels.train.taken import recorded_in

RUN_FILE = "run.json"
PARTIAL_RUN_FILE = f".{RUN_FILE}.partial"
# How the folder begins in which it is tried whether a run can be saved.
REHEARSAL = ".rehearsal-"
SUMMARY_FILE = "summary.json"
ADAPTER_FOLDER = "adapter"
# Where masters of resting weights are while the run lasts, if they are files and no other folder was named.
MASTERS_FOLDER = "masters"


class RunOptions(Protocol):
    """What the folder of a run needs to know of its options."""

    @property
    def output(self) -> Path:
        """The folder."""

    @property
    def resume(self) -> bool:
        """Whether a run there goes on."""

    @property
    def overwrite(self) -> bool:
        """Whether a run there may be replaced."""

    def sources(self) -> Sequence[tuple[str, str]]:
        """Return each (flag, value) that may name a file which the run reads."""

    def fixed(self) -> dict[str, Any]:
        """Return the options that a resumed run must share with the one it continues, as plain values."""

    def recorded(self) -> dict[str, Any]:
        """Return the options that repeat the run elsewhere, as plain values."""


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(values, indent=2) + "\n")
    os.replace(partial, path)


def open_run(options: RunOptions) -> tuple[dict[str, Any], Path | None]:
    """Take the output folder for this run; returns (what run.json holds besides the options, last checkpoint or None).

    Refuses a folder of another run unless it is resumed with the same options or may be overwritten.
    """
    folder, run_file = options.output, options.output / RUN_FILE
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output {folder} is a file; give a folder.")
    if not run_file.exists():
        if options.resume:
            raise InputError(
                f"--resume: {folder} holds no run to continue; leave --resume out, or give the run's folder."
            )
        if folder.exists() and any(not _is_leftover(path) for path in folder.iterdir()):
            raise InputError(
                f"--output {folder} holds files that are not a run of this program; give an empty or new folder."
            )
        return {}, None
    if options.resume:
        return _resumed(options, json.loads(run_file.read_text()))
    if not options.overwrite:
        raise InputError(
            f"--output {folder} holds another run; add --resume to continue it, --overwrite to replace it, "
            "or give another folder."
        )
    for flag, given in options.sources():
        if Path(given).exists() and Path(given).resolve().is_relative_to(folder.resolve()):
            raise InputError(
                f"--overwrite would delete {flag} {given}, which lies in --output {folder}; give another --output."
            )
    return {}, None


def _is_leftover(path: Path) -> bool:
    """Return whether a file or folder is what a start that was killed before its run began has left."""
    if path.name == MASTERS_FOLDER:
        return is_left_by_a_run(path)
    return path.name == PARTIAL_RUN_FILE or path.name.startswith(REHEARSAL)


def _resumed(options: RunOptions, saved: dict[str, Any]) -> tuple[dict[str, Any], Path | None]:
    before, now = saved["options"], json.loads(json.dumps(options.fixed()))
    taken = recorded_in(saved)
    if "taken" not in saved and before.get("warmup_steps") == 0:
        # Recorded alike whether it was given or not, before it followed from anything.
        before = {**before, "warmup_steps": None}
    for name in now:
        # What a run took of itself may be given by name.
        if before.get(name) != now[name] and (before.get(name) is not None or now[name] != taken.get(name)):
            flag = f"--{name.replace('_', '-')}"
            was = f"auto, which took {taken[name]}" if name in taken and before.get(name) is None else before.get(name)
            raise InputError(
                f"--resume: {options.output} was run with {flag} {was}, this command says {now[name]}; "
                "give the same options, or another --output."
            )
    remove_leftovers(options.output)
    checkpoints = find_checkpoints(options.output)
    return saved, checkpoints[-1] if checkpoints else None


def start_run(options: RunOptions, facts: dict[str, Any], kept: Path | None = None) -> None:
    """Begin a run in its folder, emptied if it may be: write run.json with what was measured before the first step.

    Called when everything that was given has proved usable, so that a mistake never costs an older run. kept: a folder
    that this run has in use already, wherever it is. Raises InputError where another run has begun in the folder since
    `open_run`.
    """
    if not (options.overwrite or options.resume) and (options.output / RUN_FILE).exists():
        raise InputError(f"another run has begun in --output {options.output} meanwhile; give another folder.")
    options.output.mkdir(parents=True, exist_ok=True)
    # run.json goes last, by being replaced: a kill in between leaves what may be overwritten again.
    for path in options.output.iterdir():
        if kept is not None and kept.resolve().is_relative_to(path.resolve()):
            continue
        if _is_leftover(path) or (options.overwrite and path.name != RUN_FILE):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    write_json(options.output / RUN_FILE, {"options": options.recorded(), **facts})


def save_final_model(model: Any, tokenizer: Any, folder: Path, state: Mapping[str, Any] | None = None) -> None:
    """Write model, configuration and tokenizer into `folder`, file by file from a whole copy written aside.

    state: the model's, where it holds a part of it only.
    """
    with written_whole(folder / "final") as partial:
        model.save_pretrained(partial, state_dict=state)
        tokenizer.save_pretrained(partial)
    for path in sorted((folder / "final").iterdir()):
        target = folder / path.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(path, target)
    (folder / "final").rmdir()
