"""`lisa-kernels flow`: train a flow whose layers are experts for a part of the time, and draw images from it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from lisa_kernels.commands.arguments import Formatter
from lisa_kernels.requirements import require

_DATA_HELP = (
    "digits (8 × 8, from scikit-learn), fashion-mnist or mnist (as in mnist:FOLDER, the folder of their files), or a "
    "folder of pictures, a subfolder for each class"
)
_REUSE_HELP = (
    "reuse the attention map of the layer before, times a gate of t per head: before the softmax, after it, or none"
)


def add_command(commands: Any) -> None:
    """Declare the commands."""
    parser = commands.add_parser(
        "flow", formatter_class=Formatter, help="train an image flow in groups of layers, draw images from it",
        description="Flow matching with groups of layers that are experts, each for an interval of time (LaTtE-Flow): "
        "a step of training or sampling runs one group.",
    )  # fmt: skip
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    _add_train(actions)
    _add_sample(actions)


def _add_train(actions: Any) -> None:
    parser = actions.add_parser("train", formatter_class=Formatter, help="train a flow on images")
    add = parser.add_argument
    add("--data", required=True, help=_DATA_HELP)
    add("--output", type=Path, required=True, help="folder for the flow, checkpoints, summary.json and report.html")
    add("--image-size", type=int, help="pixels of a side that images are brought to (default: as they are)")
    add("--autoencoder", help="folder of an autoencoder of diffusers, which stays as it is: the flow learns latents of "
        "the images, and samples are decoded")  # fmt: skip
    add("--groups", type=int, default=4, help="of layers, each the expert for an interval of time")
    add("--backbone", help="a language model, as --model of finetune, that stays as it is: it reads what to draw (a "
        "handwritten seven), and copies of its layers are trained to draw it")  # fmt: skip
    add("--begin-from", help="--output of an earlier run: of one group, whose layers each group here begins as a copy "
        "of, or of as many groups")  # fmt: skip
    add("--layers", type=int, help="of all groups together (default: 8, or the backbone's)")
    add("--hidden", type=int, help="numbers of a token (default: 128, or the backbone's)")
    add("--heads", type=int, help="of attention (default: 4, or the backbone's)")
    add("--patch", type=int, default=2, help="pixels of a token's side, or numbers of a latent's")
    add("--residual-attention", default="before", help=_REUSE_HELP)
    add("--boundaries", default="quantile", help="between intervals: quantile (an equal share of the times that are "
        "drawn), uniform, or numbers from 0 to 1 as 0,0.5,1")  # fmt: skip
    add("--times", default="uniform", help="how times are drawn: uniform or logit-normal")
    add("--overlap", type=float, default=0.05, help="share of its length by which training widens an interval")
    add("--period", type=int, default=1, help="steps that a group trains before the next")
    add("--retired-state", default="page", help="moments of groups that rest: page, keep (on the device) or drop")
    add("--resting-weights", default="keep", help="weights of groups that rest: keep (on the device) or page")
    add("--paging", help="where moments are between steps: resident, host, managed or file:DIR (default: on the "
        "device, those of groups that rest in host memory)")  # fmt: skip
    add("--lr", type=float, help="peak learning rate (default: 4e-3 for 128 numbers a token, in inverse proportion for "
        "others)")  # fmt: skip
    add("--lr-schedule", default="cosine", help="cosine, linear or constant")
    add("--warmup-steps", type=int, default=50, help="steps over which the rate rises")
    add("--weight-decay", type=float, default=0.01, help="decoupled, per unit of learning rate; vectors have none")
    add("--max-grad-norm", type=float, default=1.0, help="clip the gradient's norm to this; 0 for never")
    add("--steps", type=int, default=1000, help="optimizer steps")
    add("--batch-size", type=int, default=64, help="images per forward pass")
    add("--accumulate", type=int, default=1, help="forward passes per optimizer step")
    add("--label-dropout", type=float, default=0.1, help="share of labels left out, which guidance needs")
    add("--average", type=float, default=0.999, help="share of the averaged weights that a step keeps; the average is "
        "what is saved")  # fmt: skip
    add("--eval-fraction", type=float, default=0.05, help="share of the images held out")
    add("--eval-every", type=int, default=0, help="steps between evaluations; 0 for before and after only")
    add("--save-every", type=int, default=0, help="steps between checkpoints; 0 for none")
    add("--max-checkpoints", type=int, default=2, help="checkpoints kept")
    add("--samples", type=int, help="images of each class that are drawn at the end, for OUTPUT/samples.png and the "
        "page (default: 10, beside a backbone 1)")  # fmt: skip
    add("--device", default="auto", help="cpu, cuda, cuda:N, or auto: the first GPU where there is one")
    add("--seed", type=int, default=0, help="of weights, order, noise and times")
    add("--resume", action="store_true", help="continue the run in --output from its last checkpoint")
    add("--overwrite", action="store_true", help="replace the run in --output")
    _add_common(parser, _train)


def _add_sample(actions: Any) -> None:
    parser = actions.add_parser("sample", formatter_class=Formatter, help="draw images from a trained flow")
    add = parser.add_argument
    add("--model", type=Path, required=True, help="output folder of flow train, finished or not, or a checkpoint")
    add("--label", action="append", help="class by number or name; several times for several (default: every class)")
    add("--text", action="append", help="what to draw, of a flow with a backbone, in place of --label")
    add("--count", type=int, default=10, help="images of each class")
    add("--steps", type=int, default=40, help="of the solver")
    add("--solver", default="euler", help="euler, or heun (two evaluations a step)")
    add("--guidance", type=float, default=2.0, help="strength of classifier-free guidance, at twice the work; 1 for "
        "none")  # fmt: skip
    add("--plot", type=Path, required=True, help="file for the grid of images, a row for each class (.png, .svg, .pdf)")
    add("--device", default="auto", help="cpu, cuda, cuda:N, or auto: the first GPU where there is one")
    add("--seed", type=int, default=0, help="of the noise")
    _add_common(parser, _sample)


def _add_common(parser: argparse.ArgumentParser, run: Any) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as JSON on standard output")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.set_defaults(run=run)


def _told(arguments: argparse.Namespace, names: Any) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in names}


def _train(arguments: argparse.Namespace, console: Console) -> int:
    from lisa_kernels.flow.options import FlowOptions
    from lisa_kernels.flow.run import train_flow
    from lisa_kernels.plan.flow_run import plan_flow_run

    options = FlowOptions(**_told(arguments, FlowOptions.__dataclass_fields__))
    if options.backbone is not None:
        require("flow train --backbone", "transformers", "tokenizers")
    if options.autoencoder is not None:
        require("flow train --autoencoder", "diffusers", extra="latents")
    code, summary = train_flow(options, console, plan_flow_run)
    if arguments.json:
        print(json.dumps(summary))
    return code


def _sample(arguments: argparse.Namespace, console: Console) -> int:
    from lisa_kernels.flow.command import SampleOptions, draw_samples

    options = SampleOptions(**_told(arguments, SampleOptions.__dataclass_fields__))
    require("flow sample", "matplotlib", extra="flow")
    result = draw_samples(options, console)
    if arguments.json:
        print(json.dumps(result))
    return 0
