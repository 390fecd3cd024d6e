"""`lisa-kernels info`: what is used here."""

from __future__ import annotations

import argparse
import json
from typing import Any

from rich.console import Console


def add_command(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser("info", help="show versions and which kernel each operation uses here, and why")
    parser.add_argument("--json", action="store_true", help="print as JSON")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace, console: Console) -> int:
    from lisa_kernels.info import describe, print_info

    if arguments.json:
        print(json.dumps(describe()))
    else:
        print_info(describe(), Console())
    return 0
