"""`lisa-kernels report`: show runs as a page."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from lisa_kernels.commands.arguments import Formatter


def add_command(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "report", formatter_class=Formatter, help="show a run, or several side by side, as one page",
        description="Write a page that any browser shows without a network: losses, rate, gradient norm and speed over "
        "the steps, which layers trained when, memory planned and measured, answers before and after, and settings "
        "that differ. A run that is not finished is shown as far as it came.",
    )  # fmt: skip
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="output folder of a finetune run")
    parser.add_argument(
        "--output", type=Path, help="file for the page (default: report.html in the run's folder, of several runs here)"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON on standard output")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace, console: Console) -> int:
    from lisa_kernels.report.command import report

    result = report(arguments.runs, arguments.output)
    console.print(f"page in {result['page']}", highlight=False, soft_wrap=True)
    if arguments.json:
        print(json.dumps(result))
    return 0
