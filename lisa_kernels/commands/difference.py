"""`lisa-kernels difference`: a tuned model as a small adapter."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from lisa_kernels.commands.arguments import Formatter, add_data, readers_of
from lisa_kernels.requirements import require


def add_command(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "difference", formatter_class=Formatter, help="write what a tuned model has more than its base as an adapter",
        description="Write tuned − base as a LoRA adapter that peft loads onto the base: each changed matrix as a "
        "product of two thin ones, embedding and norms whole where they changed. The weights are read one matrix at a "
        "time. With --data, base, tuned and base with adapter are measured on it, as `lisa-kernels evaluate` does.",
    )  # fmt: skip
    add = parser.add_argument
    add("--base", required=True, help="the model that the tuned one began from: directory, hub id or sample:NAME")
    add("--tuned", required=True, help="the tuned model: the output of finetune, or any directory or hub id")
    add("--output", type=Path, required=True, help="folder for the adapter")
    add("--rank", type=int, help="of every matrix (default: 64, unless --keep or --share is given)")
    add("--keep", type=float, help="share of each matrix's squares to hold, as 0.99, with what rank that takes")
    add("--share", type=float, help="size beside the tuned model's, as 0.05; ranks go where they hold most")
    add("--matrices-only", action="store_true", help="leave out embedding, norms and biases that changed")
    add_data(parser, required=False)
    add("--choices", metavar="A,B,...", help="for --data: what every row's answer is one of")
    add("--max-rows", type=int, help="for --data: rows to use, spread evenly over the data (default: all)")
    add("--json", action="store_true", help="print the result as JSON on standard output")
    add("--debug", action="store_true", help="show tracebacks")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace, console: Console) -> int:
    needed = ["peft", *readers_of(arguments.data)] if arguments.data else []
    require("difference", "transformers", "tokenizers", *needed)
    from lisa_kernels.difference.command import DifferenceOptions, write

    names = DifferenceOptions.__dataclass_fields__
    options = DifferenceOptions(**{name: getattr(arguments, name) for name in names})
    measure = _measurement(arguments, console) if arguments.data else None
    result = write(options, console)
    if measure is not None:
        result["evaluation"] = measure()
    if arguments.json:
        print(json.dumps(result))
    return 0


def _measurement(arguments: argparse.Namespace, console: Console) -> Callable[[], dict[str, Any]]:
    """Return what measures base, tuned and adapter once that is written; the rows are read here, before."""
    from lisa_kernels.evaluate.command import EvaluateOptions, evaluate, read_questions

    options = EvaluateOptions(
        [arguments.base, arguments.tuned, str(arguments.output)], arguments.data, columns=arguments.columns,
        choices=arguments.choices, max_data_bytes=arguments.max_data_bytes, max_rows=arguments.max_rows,
    )  # fmt: skip
    return partial(evaluate, options, console, read_questions(options))
