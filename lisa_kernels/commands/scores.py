"""`lisa-kernels scores`: score a model's layers."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from lisa_kernels.commands.arguments import Formatter, add_data, add_model, readers_of
from lisa_kernels.requirements import require


def add_command(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser("scores", formatter_class=Formatter, help="score a model's layers")
    add_model(parser)
    add_data(parser, required=False)
    add = parser.add_argument
    add("--kind", default="outlier", help="outlier, hill, weight-norm, gradient-norm or uniform")
    add("--threshold", type=float, default=13.0, help="an entry is an outlier above this many times the mean (outlier)")
    add("--calibration-rows", type=int, default=128, help="rows of data to measure on")
    add("--plot", type=Path, help="write a bar chart to this file (.png, .svg, .pdf)")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace, console: Console) -> int:
    require("scores", "transformers", "tokenizers", *readers_of(arguments.data))
    from lisa_kernels.train.score_command import score

    result = score(arguments, console)
    if arguments.json:
        print(json.dumps(result))
    return 0
