"""`lisa-kernels plan`: tell a run's memory and time."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from lisa_kernels.commands.arguments import Formatter, add_data, add_method, add_model, add_rows
from lisa_kernels.commands.run_file import RUN_FILE_HELP
from lisa_kernels.requirements import require

_FIT_HELP = (
    "find the settings that fit this size, such as 16GB (1e9 bytes each) or 16GiB, all that the run takes on the card, "
    "and print their finetune command. Tried in this order: what is given; fewer rows at a time and as many more "
    "accumulated; gradient checkpointing; --offload-activations; state paged to host memory (galore, full); then "
    "--resting int8, beside it half the rank, down to 32; fewer active layers, down to 2; embedding and head low-rank; "
    "one active layer; embedding and head frozen; then without these the largest --resting SIZE that fits; then codes "
    "on the host"
)
_CARD_HELP = (
    "tell the time of a step on this card, and where it goes: a100, h100, rtx-3060, rtx-3090, rtx-4060-ti, rtx-4090, "
    "rtx-5090, l4, t4, or cpu for this machine's, which is measured; any other by --bandwidth and --tflops (default: a "
    "line for each known card that holds the run)"
)


def add_command(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "plan", formatter_class=Formatter, help="tell a fine-tuning run's peak memory and time without running it",
        description="Rehearse a fine-tuning run on tensors without storage and tell its peak memory, where it goes and "
        "which cards hold it, and how long its steps take. Options are named as in finetune. No weights are read, no "
        "GPU is needed; --data is read for the lengths of its rows, and for how many steps --epochs are.",
    )  # fmt: skip
    # What only finetune needs may be in the file.
    parser.alternatives = (frozenset({"steps", "epochs"}),)
    parser.skipped = commands.choices["finetune"]
    parser.add_argument("run_file", metavar="RUN_FILE", nargs="?", help=RUN_FILE_HELP)
    add_model(parser)
    add_method(parser)
    add = parser.add_argument
    add("--card", metavar="NAME", help=_CARD_HELP)
    add("--bandwidth", type=float, metavar="GB_S", help="of the card, in 1e9 bytes a second")
    add(
        "--tflops",
        type=float,
        help="of the card: dense 16-bit products, summed in float32, in 1e12 operations a second",
    )
    add_data(parser, required=False)
    add_rows(parser)
    add("--ranks", type=int, default=1, help="processes that train one model, which share the rows of each step")
    add("--mixed-cards", action="store_true", help="their cards are of several kinds, and take bases from the first")
    add("--shard", action="store_true", help="each of them holds a part of the weights (FSDP2)")
    add("--fit", metavar="SIZE", help=_FIT_HELP)
    add("--plot", type=Path, help="draw the memory over the run into this file (.png, .svg, .pdf)")
    parser.set_defaults(run=_run, dtype="bf16")


def _run(arguments: argparse.Namespace, console: Console) -> int:
    require("plan", "transformers")
    from lisa_kernels.plan.command import plan_command

    result = plan_command(arguments, console)
    if arguments.json:
        print(json.dumps(result))
    return 0
