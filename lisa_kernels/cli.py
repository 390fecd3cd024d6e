"""The command line, `lisa-kernels finetune | evaluate | plan | …`: a file for each command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console

from lisa_kernels.commands import bench, difference, evaluate, finetune, flow, info, plan, report, scores
from lisa_kernels.commands.run_file import CommandParser
from lisa_kernels.distributed import check_one_launched
from lisa_kernels.errors import InputError

USAGE_ERROR = 2
INTERRUPTED = 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lisa-kernels", description="Fine-tune language models by layer sampling.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=CommandParser)
    for command in (finetune, evaluate, difference, plan, scores, flow, bench, report, info):
        command.add_command(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 0, 2 for a mistake in what was given, 130 after ctrl-C."""
    words = list(sys.argv[1:] if argv is None else argv)
    name, debug = f"lisa-kernels {''.join(words[:1])}", "--debug" in words
    try:
        arguments = _parser().parse_args(words)
        if arguments.command not in ("info", "finetune"):
            check_one_launched("this command")
        code: int = arguments.run(arguments, Console(stderr=True))
    except InputError as error:
        if debug:
            raise
        print(f"{name}: {error}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        if debug:
            raise
        print(f"{name}: stopped", file=sys.stderr)
        return INTERRUPTED
    return code


if __name__ == "__main__":
    sys.exit(main())
