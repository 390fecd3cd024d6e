"""`lisa-kernels evaluate`: how good one or several models' answers are."""

from __future__ import annotations

import argparse
import json
from typing import Any

from rich.console import Console

from lisa_kernels.commands.arguments import MODEL_HELP, Formatter, add_data, readers_of
from lisa_kernels.requirements import require


def add_command(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "evaluate", formatter_class=Formatter, help="measure answers: loss, and accuracy where rows have choices",
        description="Measure one or several models on the same rows: the loss of their answers, and where rows offer "
        "choices how often the right one is the likeliest. All with a confidence interval of 95 %, and of several "
        "models the difference to the first.",
    )  # fmt: skip
    parser.add_argument("--model", action="append", required=True, help=f"{MODEL_HELP}; may be given several times")
    add_data(parser)
    add = parser.add_argument
    add("--choices", metavar="A,B,...", help="what every row's answer is one of (default: the rows' own choices: a "
        "column 'choices', or 'Answer format: a/b' at an instruction's end)")  # fmt: skip
    add("--max-rows", type=int, help="rows to use, spread evenly over the data (default: all)")
    add("--seq-len", type=int, help="tokens of a row, longer ones are cut (default: what the model reads; text 1024)")
    add("--batch-tokens", type=int, default=2048, help="tokens of a forward pass")
    add("--device", default="auto", help="cpu, cuda, cuda:N, or auto: the first GPU where there is one")
    add("--dtype", default="auto", help="weights: fp32, bf16, fp16 or auto")
    add("--seed", type=int, default=0, help="of random weights (preset:NAME)")
    add("--json", action="store_true", help="print the result as JSON on standard output")
    add("--debug", action="store_true", help="show tracebacks")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace, console: Console) -> int:
    require("evaluate", "transformers", "tokenizers", *readers_of(arguments.data))
    from lisa_kernels.evaluate.command import EvaluateOptions, evaluate

    names = EvaluateOptions.__dataclass_fields__
    result = evaluate(EvaluateOptions(**{name: getattr(arguments, name) for name in names}), console)
    if arguments.json:
        print(json.dumps(result))
    return 0
