"""What the benchmark commands share: options that mean the same everywhere, and how mistakes and results are shown."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console

from bench.rows import environment
from lisa_kernels.cli import USAGE_ERROR
from lisa_kernels.devices import choose_device, survey_machine
from lisa_kernels.errors import InputError, unknown_name

WIDTH = 180


def parse_device(text: str) -> str:
    """Return `cpu` or `cuda`; `auto` is a GPU where torch sees one."""
    if text not in ("auto", "cpu", "cuda"):
        raise unknown_name("device", text, ["auto", "cpu", "cuda"])
    return choose_device(text, survey_machine()).type


def positive(name: str, value: int) -> int:
    """Return the value of option `name`, or raise InputError for one below 1."""
    if value < 1:
        raise InputError(f"--{name} {value}: a number of at least 1 is wanted.")
    return value


def set_threads(threads: int | None) -> None:
    """Let torch use so many CPU threads; None leaves it as it is."""
    if threads is not None:
        torch.set_num_threads(positive("threads", threads))


def table_console() -> Console:
    """Return the console for tables: a file or pipe has no width of its own."""
    return Console(width=None if sys.stdout.isatty() else WIDTH)


def main_of(
    name: str,
    description: str,
    add_options: Callable[[argparse.ArgumentParser], None],
    run: Callable[[argparse.Namespace, Console], Sequence[Any]],
    argv: Sequence[str] | None,
) -> int:
    """Parse the options, run one benchmark and print its rows (dataclasses) where JSON is asked for.

    Returns 0, or 2 for a mistake in what was given.
    """
    parser = argparse.ArgumentParser(prog=f"python -m bench.{name}", description=description)
    add_options(parser)
    arguments = parser.parse_args(argv)
    try:
        rows = run(arguments, Console(stderr=True))
    except InputError as error:
        if arguments.debug:
            raise
        print(f"lisa-kernels bench: {error}", file=sys.stderr)
        return USAGE_ERROR
    if arguments.json:
        print(json.dumps({"environment": environment(), "rows": [asdict(row) for row in rows]}))
    return 0
