"""The command line: `lisa-kernels finetune | plan | scores | bench | info`."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from lisa_kernels.errors import InputError

_MODEL_HELP = (
    "directory, hub id, preset:NAME (random weights): tiny, small, tinyllama-1.1b, llama-2-7b, llama-3.1-8b, "
    "qwen2.5-7b, mistral-7b, or sample:smollm2-135m (a small pretrained one, of the extra sample)"
)
_DATA_HELP = (
    ".jsonl (text, or prompt/completion, or messages), .txt, .parquet, hub id, or the text of Python's own standard "
    "library: stdlib, stdlib:code, stdlib:docstrings, stdlib:questions"
)
_LR_HELP = (
    "peak learning rate (default: lisa and ows 5e-5, owlore 3e-4, badam and full 1e-5, galore 1e-4, lora-fa 4e-4)"
)
_SIZES_HELP = "elements of the tensor: 2^20, 1000, several with commas, or a range in factors of 4 as 2^12..2^28"
_PEERS_HELP = (
    "torch-fused, torch-foreach, bitsandbytes, torchao, flashoptim, several with commas, all, or none; torch-fused in "
    "fp32 always runs, as the yardstick of ratios"
)
_METHODS_HELP = (
    "owlore-frozen, owlore-low-rank, owlore-always, lisa, badam-ours, galore, lora-fa, full, torch-full, peft-lora, "
    "peft-lora-fa, galore-torch, badam; several with commas, ours, peers or all"
)
_FIT_HELP = (
    "find the settings that fit this size, such as 16GB (1e9 bytes each) or 16GiB, all that the run takes on the card, "
    "and print their finetune command. Tried in this order: what is given; fewer rows at a time and as many more "
    "accumulated; gradient checkpointing; --offload-activations; state paged to host memory (galore, full); then fewer "
    "active layers, down to 2; half the rank, down to 32; embedding and head low-rank; one active layer; embedding and "
    "head frozen"
)
USAGE_ERROR = 2
INTERRUPTED = 130


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, except where there is none to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        nothing_to_show = action.default is None or isinstance(action.default, bool)
        if nothing_to_show or "default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help=_MODEL_HELP)
    parser.add_argument("--seq-len", type=int, default=512, help="tokens per row")
    parser.add_argument("--batch-size", type=int, default=4, help="rows per forward pass")
    parser.add_argument(
        "--dtype", default="auto", help="weights: fp32, bf16, or auto (bf16 on GPUs that have it, else fp32)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of data order, sampler, rounding and random weights")
    parser.add_argument("--json", action="store_true", help="print the result as JSON on standard output")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")


def _add_data(parser: argparse.ArgumentParser, required: bool = True) -> None:
    parser.add_argument("--data", required=required, help=_DATA_HELP)
    parser.add_argument("--max-data-bytes", type=int, help="read at most this many bytes of text (default: all)")


def _add_method(parser: argparse.ArgumentParser) -> None:
    """Declare what decides the memory of a run besides model, batch and dtype."""
    add = parser.add_argument
    add("--method", default="owlore", help="lisa, ows, owlore, badam, galore, lora-fa or full")
    add(
        "--active-layers",
        type=int,
        help="layers trained at a time (default: 2 for lisa and ows, 5 for owlore, 1 for badam)",
    )
    add("--period", type=int, help="steps between switches (default: 20 for lisa, else 50)")
    add("--rank", type=int, help="of low-rank layers (default: 128, lora-fa 16; less on small models)")
    add("--alpha", type=float, help="scale of lora-fa's adapters, divided by the rank (default: 32)")
    add(
        "--targets",
        help="layers with lora-fa's adapters: all-linear, or names such as q_proj,v_proj (default: all-linear)",
    )
    add("--master", help="of 16-bit low-rank matrices while they train: remainder keeps 16 more bits (default: none)")
    add(
        "--embeddings",
        help="embedding and head: always, low-rank, frozen or sampled (default: always; owlore low-rank, badam frozen)",
    )
    add(
        "--scores",
        help="what owlore and ows draw by: outlier, hill, weight-norm, gradient-norm or uniform (default: outlier)",
    )
    add("--retired-state", help="moments of layers that leave: drop, keep (on the device) or page (default: drop)")
    add(
        "--paging",
        help="where moments are between steps: resident, host, managed (unified memory) or file:DIR (default: on the "
        "device); where paged ones of layers that left are, too (default: host)",
    )
    add("--max-grad-norm", type=float, default=1.0, help="clip the gradient's norm to this; 0 for never")
    add("--accumulate", type=int, default=1, help="forward passes per optimizer step")
    add("--keep-logits", action="store_true", help="form the logits of all tokens for the training loss")
    add("--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=None,
        help="recompute activations (default: from 0.5e9 parameters)")  # fmt: skip
    add("--offload-activations", action="store_true", help="recompute activations, and keep what that starts from in "
        "host memory until it is needed")  # fmt: skip


def _add_finetune(commands: Any) -> None:
    parser = commands.add_parser("finetune", formatter_class=_Formatter, help="fine-tune a model by layer sampling")
    _add_model(parser)
    _add_data(parser)
    _add_method(parser)
    add = parser.add_argument
    add(
        "--output",
        type=Path,
        required=True,
        help="folder for the model, checkpoints, summary.json and, of lora-fa, adapter/ as peft reads it",
    )
    add(
        "--calibration-rows",
        type=int,
        default=128,
        help="rows of the training data that outlier scores are measured on",
    )
    add("--lr", type=float, help=_LR_HELP)
    add("--lr-schedule", default="linear", help="linear, cosine or constant")
    add("--warmup-steps", type=int, default=0, help="steps over which the rate rises from 0")
    add("--weight-decay", type=float, default=0.01, help="decoupled, per unit of learning rate; vectors have none")
    add("--steps", type=int, help="optimizer steps (default: 200)")
    add("--epochs", type=float, help="passes over the data, in place of --steps")
    add("--no-packing", dest="packing", action="store_false", help="one example per row")
    add("--eval-fraction", type=float, default=0.05, help="share of the data held out")
    add("--eval-every", type=int, default=0, help="steps between evaluations; 0 for before and after only")
    add("--save-every", type=int, default=0, help="steps between checkpoints; 0 for none")
    add("--max-checkpoints", type=int, default=2, help="checkpoints kept")
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
    parser.set_defaults(run=_run_finetune)


def _add_plan(commands: Any) -> None:
    parser = commands.add_parser(
        "plan", formatter_class=_Formatter, help="tell the peak memory of a fine-tuning run without running it",
        description="Rehearse a fine-tuning run on tensors without storage and tell its peak memory, where it goes and "
        "which cards hold it. Options are named as in finetune. No weights are read, no GPU is needed.",
    )  # fmt: skip
    _add_model(parser)
    _add_method(parser)
    add = parser.add_argument
    add("--fit", metavar="SIZE", help=_FIT_HELP)
    add("--plot", type=Path, help="draw the memory over the run into this file (.png, .svg, .pdf)")
    parser.set_defaults(run=_run_plan, dtype="bf16")


def _add_scores(commands: Any) -> None:
    parser = commands.add_parser("scores", formatter_class=_Formatter, help="score a model's layers")
    _add_model(parser)
    _add_data(parser, required=False)
    add = parser.add_argument
    add("--kind", default="outlier", help="outlier, hill, weight-norm, gradient-norm or uniform")
    add("--threshold", type=float, default=13.0, help="an entry is an outlier above this many times the mean (outlier)")
    add("--calibration-rows", type=int, default=128, help="rows of data to measure on")
    add("--plot", type=Path, help="write a bar chart to this file (.png, .svg, .pdf)")
    parser.set_defaults(run=_run_scores)


def add_bench_optimizer_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `bench optimizer`, which `python -m bench.optimizer` takes as well."""
    add = parser.add_argument
    add("--sizes", default="2^12,2^16,2^20,2^24,2^26,2^28", help=_SIZES_HELP)
    add("--small-tensors", action="store_true", help="also 10,000 tensors of 1,024 elements")
    add("--dtype", default="all", help="of weights and gradients: fp32, bf16 or all")
    add("--peers", default="all", help=_PEERS_HELP)
    add("--rounds", type=int, default=20, help="turns of each optimizer; fewer, at least 5, where a second ends first")
    add("--no-limits", action="store_true", help="run peers on CPUs also where one step takes seconds")
    add("--plot", type=Path, help="draw ns per element over the size into this file (.png, .svg, .pdf)")
    _add_bench_common(parser, "optimizer")


def add_bench_step_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `bench step`, which `python -m bench.step` takes as well."""
    add = parser.add_argument
    add("--methods", default="all", help=_METHODS_HELP)
    add("--layers", type=int, default=12, help="decoder layers of the Llama model, whose weights are random")
    add("--width", type=int, default=768, help="of its hidden states")
    add("--intermediate", type=int, default=2048, help="width inside its MLPs")
    add("--heads", type=int, default=12, help="attention heads")
    add("--vocabulary", type=int, default=8192, help="tokens it knows")
    add("--batch", type=int, default=4, help="rows per step")
    add("--seq-len", type=int, default=256, help="tokens per row")
    add("--dtype", default="fp32", help="of the weights: fp32 or bf16")
    add("--rank", type=int, default=64, help="of owlore's layers")
    add("--active-layers", type=int, default=5, help="layers that owlore trains at a time")
    add("--lora-rank", type=int, default=16, help="of LoRA and LoRA-FA, ours and peers'")
    add("--galore-rank", type=int, default=128, help="of GaLore, ours and the peer's")
    add("--scores", default="uniform", help="what owlore draws by: uniform, or llama-2-7b's published outlier scores")
    add("--rounds", type=int, default=8, help="draws of layers, or steps of methods that draw none")
    add("--plot", type=Path, help="draw the parts of each step into this file (.png, .svg, .pdf)")
    _add_bench_common(parser, "step")


def add_bench_lowrank_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `bench lowrank`, which `python -m bench.lowrank` takes as well."""
    add = parser.add_argument
    add("--shapes", default="768x2048,4096x4096,4096x11008", help="INPUTSxOUTPUTS of the layer, several with commas")
    add("--tokens", type=int, default=1024, help="rows of its input")
    add("--dtype", default="all", help="of weights and activations: fp32, bf16 or all")
    add("--rank", type=int, default=128, help="of low-rank layers, ours and galore-torch's")
    add("--lora-rank", type=int, default=16, help="of LoRA and LoRA-FA, ours and peft's")
    add("--gap", type=int, default=200, help="steps between refreshes of a basis, over which their time is spread")
    add("--rounds", type=int, default=10, help="turns of each layer; fewer, at least 3, where five seconds end first")
    add("--no-limits", action="store_true", help="run on CPUs also what takes minutes")
    add("--plot", type=Path, help="draw forward and backward of each layer into this file (.png, .svg, .pdf)")
    _add_bench_common(parser, "lowrank")


def _add_bench_common(parser: argparse.ArgumentParser, name: str) -> None:
    add = parser.add_argument
    add("--device", default="auto", help="cpu, cuda, or auto: a GPU where there is one")
    add("--threads", type=int, help="CPU threads (default: as torch has them)")
    add("--record", action="store_true", help=f"append the rows to bench/results/{name}.jsonl")
    add("--json", action="store_true", help="print the result as JSON on standard output")
    add("--debug", action="store_true", help="show tracebacks")


def _add_bench(commands: Any) -> None:
    parser = commands.add_parser("bench", help="time steps and kernels beside other packages (needs the sources)")
    benchmarks = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")

    def add(name: str, help: str, description: str, add_options: Callable[[argparse.ArgumentParser], None]) -> None:
        benchmark = benchmarks.add_parser(name, formatter_class=_Formatter, help=help, description=description)
        add_options(benchmark)
        benchmark.set_defaults(run=_run_bench)

    add(
        "optimizer",
        "one optimizer step: ms, ns per element, GB/s, share of copy speed, bytes of state",
        "Time whole optimizer steps in one process and in turns. A peer that cannot run has a row with "
        "the reason. GB/s counts weights and state read and written once and gradients read once.",
        add_bench_optimizer_options,
    )
    add(
        "step",
        "whole training steps: forward, backward, optimizer, refresh; bytes saved, kept and at the peak",
        "Time whole training steps of a Llama model in one process and in turns, beside full fine-tuning, peft, "
        "galore-torch and badam. Methods that switch layers are averaged over draws; what only some steps do (new "
        "bases, switches) is timed apart and spread over the steps between. A peer that cannot run has a row with the "
        "reason.",
        add_bench_step_options,
    )
    add(
        "lowrank",
        "one linear layer: forward, backward, bytes saved, and what its optimizer takes",
        "Time single linear layers, trained, frozen, low-rank and with adapters, in one process and in turns; then the "
        "update of one matrix in low rank beside galore-torch's.",
        add_bench_lowrank_options,
    )


def _add_info(commands: Any) -> None:
    parser = commands.add_parser("info", help="show versions and which kernel each operation uses here, and why")
    parser.add_argument("--json", action="store_true", help="print as JSON")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.set_defaults(run=_run_info)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lisa-kernels", description="Fine-tune language models by layer sampling.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_finetune(commands)
    _add_plan(commands)
    _add_scores(commands)
    _add_bench(commands)
    _add_report(commands)
    _add_info(commands)
    return parser


def _run_finetune(arguments: argparse.Namespace, console: Console) -> int:
    from lisa_kernels.train.options import FineTuneOptions

    values = {key: value for key, value in vars(arguments).items() if key not in ("command", "run", "debug")}
    options = FineTuneOptions(**values)
    from lisa_kernels.plan.command import plan_run
    from lisa_kernels.train.finetune import finetune

    code, summary = finetune(options, console, plan_run)
    if arguments.json:
        print(json.dumps(summary))
    return code


def _add_report(commands: Any) -> None:
    parser = commands.add_parser(
        "report", formatter_class=_Formatter, help="show a run, or several side by side, as one page",
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
    parser.set_defaults(run=_run_report)


def _run_report(arguments: argparse.Namespace, console: Console) -> int:
    from lisa_kernels.report.command import report

    result = report(arguments.runs, arguments.output)
    console.print(f"page in {result['page']}", highlight=False, soft_wrap=True)
    if arguments.json:
        print(json.dumps(result))
    return 0


def _run_plan(arguments: argparse.Namespace, console: Console) -> int:
    from lisa_kernels.plan.command import plan_command

    result = plan_command(arguments, console)
    if arguments.json:
        print(json.dumps(result))
    return 0


def _run_scores(arguments: argparse.Namespace, console: Console) -> int:
    from lisa_kernels.train.score_command import score

    result = score(arguments, console)
    if arguments.json:
        print(json.dumps(result))
    return 0


def _run_bench(arguments: argparse.Namespace, console: Console) -> int:
    """Run the benchmark in a process of its own, from the sources: benchmarks are not part of the package."""
    root = Path(__file__).resolve().parents[1]
    if not (root / "bench" / f"{arguments.benchmark}.py").is_file():
        raise InputError(
            f"the benchmarks are not part of the installed package (looked in {root}): get the sources, install them "
            f"with pip install --editable '.[bench]', and run the command again."
        )
    options = []
    for key, value in vars(arguments).items():
        if key in ("command", "benchmark", "run") or value is None or value is False:
            continue
        text = str(value.resolve()) if isinstance(value, Path) else str(value)
        options.append(f"--{key.replace('_', '-')}" + ("" if value is True else f"={text}"))
    return subprocess.run([sys.executable, "-m", f"bench.{arguments.benchmark}", *options], cwd=root).returncode


def _run_info(arguments: argparse.Namespace, console: Console) -> int:
    from lisa_kernels.info import describe, print_info

    if arguments.json:
        print(json.dumps(describe()))
    else:
        print_info(describe(), Console())
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 0, 2 for a mistake in what was given, 130 after ctrl-C."""
    arguments = _parser().parse_args(argv)
    console = Console(stderr=True)
    try:
        code: int = arguments.run(arguments, console)
    except InputError as error:
        if arguments.debug:
            raise
        print(f"lisa-kernels {arguments.command}: {error}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        if arguments.debug:
            raise
        print(f"lisa-kernels {arguments.command}: stopped", file=sys.stderr)
        return INTERRUPTED
    return code


if __name__ == "__main__":
    sys.exit(main())
