"""`lisa-kernels finetune`: train a model."""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from lisa_kernels.commands.arguments import Formatter, OrAuto, add_data, add_method, add_model, add_rows, readers_of
from lisa_kernels.commands.run_file import RUN_FILE_HELP, SAVE_CONFIG_HELP, CommandParser, write_run_file
from lisa_kernels.requirements import require

_LR_HELP = (
    "peak learning rate; auto: what the method was found to train best with on a model of width 576, times "
    "576 / hidden size (default: auto)"
)
_WARMUP_HELP = "steps over which the rate rises from 0; auto: 5 %% of the steps (default: auto)"


def add_command(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser("finetune", formatter_class=Formatter, help="fine-tune a model by layer sampling")
    parser.alternatives = (frozenset({"steps", "epochs"}), frozenset({"resume", "overwrite"}))
    parser.add_argument("run_file", metavar="RUN_FILE", nargs="?", help=RUN_FILE_HELP)
    parser.add_argument("--save-config", metavar="FILE", type=Path, help=SAVE_CONFIG_HELP)
    add_model(parser)
    add_data(parser)
    add_rows(parser)
    add_method(parser)
    add = parser.add_argument
    add(
        "--output",
        type=Path,
        required=True,
        help="folder for the model, checkpoints, summary.json and, of lora and lora-fa, adapter/ as peft reads it",
    )
    add(
        "--calibration-rows",
        type=int,
        default=128,
        help="rows of the training data that outlier scores are measured on",
    )
    add("--lr", type=OrAuto(float), help=_LR_HELP)
    add("--lr-schedule", default="linear", help="linear, cosine or constant")
    add("--warmup-steps", type=OrAuto(int), help=_WARMUP_HELP)
    add("--weight-decay", type=float, default=0.01, help="decoupled, per unit of learning rate; vectors have none")
    add("--eval-every", type=int, default=0, help="steps between evaluations; 0 for before and after only")
    add("--save-every", type=int, default=0, help="steps between checkpoints; 0 for none")
    add("--max-checkpoints", type=int, default=2, help="checkpoints kept")
    add(
        "--device", default="auto", help="cpu, cuda, cuda:N, or auto: the first GPU where there is one; a run takes one"
    )
    add(
        "--shard",
        action="store_true",
        help="of several processes each holds a part of the weights (FSDP2); --resume goes on with any number",
    )
    add("--resume", action="store_true", help="continue the run in --output from its last checkpoint")
    add("--overwrite", action="store_true", help="replace the run in --output")
    add(
        "--report-to",
        default="none",
        help="where figures go meanwhile: none, tensorboard (into OUTPUT/tensorboard), wandb, or both with a comma",
    )
    add(
        "--samples",
        type=int,
        help="held-out prompts that the model answers before and after, shown in OUTPUT/report.html (default: 3; on a "
        "CPU none above 1e9 parameters)",
    )
    parser.set_defaults(run=functools.partial(_run, parser))


def _run(parser: CommandParser, arguments: argparse.Namespace, console: Console) -> int:
    from lisa_kernels.train.options import FineTuneOptions

    told = {option.dest: getattr(arguments, option.dest) for option in parser.options() if option.dest != "debug"}
    options = FineTuneOptions(**told, taken=arguments.taken)
    if arguments.save_config is not None:
        write_run_file(arguments.save_config, parser, arguments)
        console.print(f"options in {arguments.save_config}", highlight=False, soft_wrap=True)
        return 0
    # Templates of conversations are jinja2's.
    require("finetune", "transformers", "tokenizers", "accelerate", "jinja2", *readers_of(options.data))
    from lisa_kernels.plan.command import plan_run
    from lisa_kernels.train.finetune import finetune

    code, summary = finetune(options, console, plan_run)
    # Of several processes one has it.
    if arguments.json and summary:
        print(json.dumps(summary))
    return code
