"""`lisa-kernels bench`: time steps and kernels beside other packages."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from lisa_kernels.commands.arguments import BlocksOrSize, Formatter, Recomputation
from lisa_kernels.errors import InputError

_SIZES_HELP = "elements of the tensor: 2^20, 1000, several with commas, or a range in factors of 4 as 2^12..2^28"
_PEERS_HELP = (
    "torch-fused, torch-foreach, bitsandbytes, torchao, flashoptim, several with commas, all, or none; torch-fused in "
    "fp32 always runs, as the yardstick of ratios"
)
_METHODS_HELP = (
    "owlore-frozen, owlore-shallow (draws neighbours together), owlore-sixth (so a sixth of the layers), "
    "owlore-first-block (so, the embedding while the first layer is drawn), owlore-low-rank, owlore-always, "
    "owlore-int8 and owlore-nf4 (shallow, weights at rest in 8 and 4 bits), lisa, badam-ours, galore, lora-fa, full, "
    "torch-full, peft-lora, peft-qlora, peft-lora-fa, galore-torch, badam; with --model lora too, no peft-lora-fa, and "
    "owlore-frozen draws shallow sets; several with commas, ours, peers or all"
)
_RECOMPUTATION_HELP = (
    "of --model: compute activations again, in all blocks or in this many of the lowest; auto: in as few as each "
    "method needs to fit what is free, or a size such as 24GB (default: in all where the model has 500 million "
    "parameters)"
)
_MODEL_HELP = (
    "measure the steps of this model in the place of a Llama of the shape below: one method after the other, beside "
    "its plan, in a file of rows to be sent; directory, hub id or preset:NAME, of which only the configuration is "
    "read, for weights are random"
)


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
    add("--model", help=_MODEL_HELP)
    add("--layers", type=int, default=12, help="decoder layers of the Llama model, whose weights are random")
    add("--width", type=int, default=768, help="of its hidden states")
    add("--intermediate", type=int, default=2048, help="width inside its MLPs")
    add("--heads", type=int, default=12, help="attention heads")
    add("--vocabulary", type=int, default=8192, help="tokens it knows")
    add("--batch", type=int, help="rows per step (default: 4; of --model 1)")
    add("--seq-len", type=int, help="tokens per row (default: 256; of --model 1024)")
    add("--dtype", help="of the weights: fp32 or bf16 (default: fp32; of --model what its device multiplies best)")
    add(
        "--gradient-checkpointing", action=Recomputation, type=BlocksOrSize(), metavar="HOW", help=_RECOMPUTATION_HELP
    )  # fmt: skip
    add("--minutes", type=float, default=9.0, help="of --model: no method is begun later")
    add("--output", type=Path, metavar="FILE", help="of --model: its rows, as .jsonl (default: in runs/)")
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


def add_command(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser("bench", help="time steps and kernels beside other packages (needs the sources)")
    benchmarks = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")

    def add(name: str, help: str, description: str, add_options: Callable[[argparse.ArgumentParser], None]) -> None:
        benchmark = benchmarks.add_parser(name, formatter_class=Formatter, help=help, description=description)
        add_options(benchmark)
        benchmark.set_defaults(run=_run)

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
        "galore-torch and badam; or, with --model, those of any model one after the other, part by part, beside what "
        "plan says of their time, launches and memory. Methods that switch layers are averaged over draws; what only "
        "some steps do (new bases, switches) is timed apart and spread over the steps between. A peer that cannot run "
        "has a row with the reason.",
        add_bench_step_options,
    )
    add(
        "lowrank",
        "one linear layer: forward, backward, bytes saved, and what its optimizer takes",
        "Time single linear layers, trained, frozen, low-rank and with adapters, in one process and in turns; then the "
        "update of one matrix in low rank beside galore-torch's.",
        add_bench_lowrank_options,
    )


def _run(arguments: argparse.Namespace, console: Console) -> int:
    """Run the benchmark in a process of its own, from the sources: benchmarks are not part of the package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / "bench" / f"{arguments.benchmark}.py").is_file():
        raise InputError(
            f"the benchmarks are not part of the installed package (looked in {root}): get the sources, install them "
            f"with pip install --editable '.[bench]', and run the command again."
        )
    options = []
    for key, value in vars(arguments).items():
        if key == "gradient_checkpointing" and value is False:
            options.append("--no-gradient-checkpointing")
        if key in ("command", "benchmark", "run") or value is None or value is False:
            continue
        text = str(value.resolve()) if isinstance(value, Path) else str(value)
        options.append(f"--{key.replace('_', '-')}" + ("" if value is True else f"={text}"))
    return subprocess.run([sys.executable, "-m", f"bench.{arguments.benchmark}", *options], cwd=root).returncode
