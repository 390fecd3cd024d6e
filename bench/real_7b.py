"""A real training step of a 7B model on this machine: seconds of its parts and the most memory the process held.

    python -m bench.real_7b                     # OwLore, 5 of 32 layers, rank 128, 64 tokens; needs 15 GB
    python -m bench.real_7b --method lisa
    python -m bench.real_7b --resting nf4       # codes beside masters in 16 bits; needs 18 GB
    python -m bench.real_7b --resting nf4 --masters FOLDER   # masters in files of 13 GB, which are mapped; needs 5 GB
    python -m bench.real_7b --resting nf4 --masters FOLDER --resting-where FOLDER   # codes in a file too; needs 2 GB
    python -m bench.real_7b --resting mixed --calibration-rows 4   # what each matrix loses is measured before it rests
    python -m bench.real_7b --layers 2          # a thinner stack, to try it

The geometry is Llama-2-7B's unless --preset names another, the weights are random bfloat16. The last step trains other
layers than those before it; the first step of a draw finds the bases of its layers. The peak is set beside that of a
plan of the same steps; with masters in files what is resident of files does not count, for the system may drop it.
With codes in a file two blocks of them are in memory, as they are on a device; its host would hold two more.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from bench.command import main_of, positive, set_threads
from bench.held_bytes import STATUS, reset_peak, status_bytes
from bench.mapped_model import AnonymousPeak, write_model
from bench.rows import append_row
from bench.timing import seconds_of_parts
from lisa_kernels import LISA, OwLore, attach
from lisa_kernels.errors import InputError, unknown_name
from lisa_kernels.methods import Method
from lisa_kernels.methods.precision import is_picked
from lisa_kernels.plan.rehearsal import Workload, rehearse
from lisa_kernels.train.presets import preset_config
from lisa_kernels.train.size_rows import ROW_TOKENS

PRESET, LR = "llama-2-7b", 3e-4
METHODS = ("owlore", "lisa")
# The folders of weights and masters in that of --masters.
MODEL, MASTERS = "model", "masters"
PATTERN_ELEMENTS, WEIGHT_SCALE = 1 << 20, 0.02


@dataclass(frozen=True)
class Row:
    """One training step: seconds of its parts, and the process's resident bytes after it and at their peak so far.

    peak_growth_bytes: the resident bytes at the peak, less those before the model was built. planned_bytes: the peak by
    plan of this step and those before.
    """

    method: str
    layers: int
    tokens: int
    step: int
    active_layers: list[int]
    rank: int | None
    embeddings: str
    loss: float
    build_s: float
    attach_s: float
    forward_s: float
    backward_s: float
    optimizer_s: float
    step_s: float
    resident_bytes: int
    peak_resident_bytes: int
    peak_growth_bytes: int
    planned_bytes: int | None = None
    resting: str | None = None
    preset: str = PRESET
    masters: str = "host"
    peak_anonymous_growth_bytes: int | None = None
    master_bytes_written: int = 0
    resting_where: str = "device"
    code_bytes_read: int = 0
    calibration_rows: int = 0


def build_model(layers: int, folder: Path | None = None, preset: str | None = None) -> Any:
    """Return the model with random bfloat16 weights; one pattern of numbers fills them all, which takes seconds.

    folder: where they are written to, and mapped from; None: they are in memory.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    config = preset_config(preset or PRESET)
    config.num_hidden_layers = layers
    config.use_cache = False
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    pattern = torch.randn(PATTERN_ELEMENTS, generator=torch.Generator().manual_seed(0)).mul_(WEIGHT_SCALE)
    pattern = pattern.to(torch.bfloat16)
    if folder is not None:
        write_model(model, folder, pattern)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, local_files_only=True).train()
    for module in model.modules():
        for name, param in module.named_parameters(recurse=False):
            filled = torch.empty(param.shape, dtype=torch.bfloat16)
            _fill(filled, pattern)
            setattr(module, name, nn.Parameter(filled))
    return model.train()


def _fill(weight: torch.Tensor, pattern: torch.Tensor) -> None:
    """Fill a norm's weight with ones, and a matrix with the pattern, over and over."""
    if weight.dim() < 2:
        weight.fill_(1.0)
        return
    flat = weight.view(-1)
    for part in flat.split(len(pattern)):
        part.copy_(pattern[: len(part)])


def method_of(arguments: argparse.Namespace) -> Method:
    """Return the method that was asked for, its layers drawn uniformly; it switches before the last step."""
    if arguments.method not in METHODS:
        raise unknown_name("method", arguments.method, METHODS)
    period = max(1, arguments.steps - 1)
    if arguments.method == "lisa":
        return LISA(arguments.active_layers or 2, period, embeddings=arguments.embeddings or "always")
    return OwLore(
        arguments.active_layers or 5, period, rank=arguments.rank, scores="uniform",
        embeddings=arguments.embeddings or "frozen",
    )  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add = parser.add_argument
    add("--method", default="owlore", help="owlore or lisa")
    add("--layers", type=int, default=32, help="decoder layers, 0.4 GB each")
    add("--tokens", type=int, default=64, help="in the one row of the batch")
    add("--steps", type=int, default=3, help="training steps; the last one is of other layers")
    add("--active-layers", type=int, help="layers trained at a time (default: owlore 5, lisa 2)")
    add("--rank", type=int, default=128, help="of owlore's layers")
    add("--embeddings", help="embedding and head (default: owlore frozen, lisa always)")
    add("--resting", help="bits in which matrices compute: int8, mixed or nf4 (owlore; default: 16)")
    add("--calibration-rows", type=int, default=0, help=f"of {ROW_TOKENS} tokens, by which mixed is measured first")
    add("--masters", type=Path, help="folder for weights and masters in files that are mapped (default: in memory)")
    add("--resting-where", type=Path, metavar="FOLDER", help="folder for a file of codes (default: in memory)")
    add("--preset", help=f"geometry (default: {PRESET}), such as llama-3.1-8b")
    add("--seed", type=int, default=0, help="of the draws")
    add("--threads", type=int, help="CPU threads (default: as torch has them)")
    add("--record", action="store_true", help="append the rows to bench/results/real_7b.jsonl")
    add("--json", action="store_true", help="print the result as JSON on standard output")
    add("--debug", action="store_true", help="show tracebacks")


def run(arguments: argparse.Namespace, console: Console) -> list[Row]:
    """Build the model, train it for some steps and show what they took; returns a row for each step."""
    for name in ("layers", "tokens", "steps"):
        positive(name, getattr(arguments, name))
    if arguments.calibration_rows:
        positive("calibration-rows", arguments.calibration_rows)
        if not is_picked(arguments.resting):
            raise InputError(
                "--calibration-rows is for matrices in 4 and 8 bits; give --resting mixed, or leave it out."
            )
    if not STATUS.exists():
        raise InputError("the most memory that a process held is read from /proc: run this on Linux.")
    method = method_of(arguments)
    set_threads(arguments.threads)
    if arguments.masters is None:
        return _run(arguments, method, None, console)
    if arguments.resting is None:
        raise InputError("--masters is for weights that rest in few bits; give --resting too.")
    try:
        return _run(arguments, method, arguments.masters, console)
    finally:
        for name in (MODEL, MASTERS):
            shutil.rmtree(arguments.masters / name, ignore_errors=True)


def _run(arguments: argparse.Namespace, method: Method, folder: Path | None, console: Console) -> list[Row]:
    # What is imported is none of the run's.
    from transformers import LlamaForCausalLM  # noqa: F401

    reset_peak()
    before, anonymous = status_bytes("VmRSS"), status_bytes("RssAnon")
    with AnonymousPeak() as peak:
        return _steps(arguments, method, folder, console, {"before": before, "anonymous": anonymous, "peak": peak})


def _steps(
    arguments: argparse.Namespace, method: Method, folder: Path | None, console: Console, at_start: dict[str, Any]
) -> list[Row]:  # fmt: skip
    begin = time.perf_counter()
    model = build_model(arguments.layers, None if folder is None else folder / MODEL, arguments.preset)
    built = time.perf_counter()
    masters = None if folder is None else folder / MASTERS
    optimizer = attach(
        model, method, lr=LR, seed=arguments.seed, resting=arguments.resting, masters=masters,
        resting_where=None if arguments.resting_where is None else str(arguments.resting_where),
        calibration=_tokens(model, arguments.calibration_rows),
    )  # fmt: skip
    attached = time.perf_counter()
    facts = {
        "method": arguments.method, "layers": arguments.layers, "tokens": arguments.tokens,
        "rank": method.get("rank", None), "embeddings": method.get("embeddings", ""),
        "build_s": built - begin, "attach_s": attached - built, "resting": arguments.resting,
        "preset": arguments.preset or PRESET, "masters": "host" if folder is None else "files",
        "resting_where": "device" if arguments.resting_where is None else "files",
        "calibration_rows": arguments.calibration_rows,
    }  # fmt: skip
    console.print(
        f"built in {facts['build_s']:.1f} s, attached in {facts['attach_s']:.1f} s; {method}", highlight=False
    )
    rows = []
    for number in range(arguments.steps):
        row = _step(model, optimizer, arguments.tokens, {**facts, **at_start}, number)
        console.print(in_words(row), highlight=False, soft_wrap=True)
        rows.append(row)
    rows = with_plans(rows, model.config, method, arguments.resting_where)
    measured, planned = rows[-1].peak_growth_bytes, rows[-1].planned_bytes or 0
    beside = ""
    if folder is not None:
        read = f", {rows[-1].code_bytes_read / 1e9:.2f} GB of codes read" if arguments.resting_where else ""
        measured = rows[-1].peak_anonymous_growth_bytes or 0
        beside = f", files apart; {rows[-1].master_bytes_written / 1e9:.2f} GB of masters were written{read}"
    console.print(
        f"the peak is {measured / 1e9:.3f} GB above what the process held before the model was built, by plan "
        f"{planned / 1e9:.3f} GB ({planned / max(1, measured) - 1:+.1%}){beside}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    if arguments.record:
        for row in rows:
            append_row("real_7b", {**asdict(row), "steps": arguments.steps, "ran_on": "cpu"})
    return rows


def _tokens(model: Any, rows: int) -> list[dict[str, torch.Tensor]] | None:
    generator = torch.Generator().manual_seed(0)
    size = (1, ROW_TOKENS)
    return [
        {"input_ids": torch.randint(model.config.vocab_size, size, generator=generator)} for _ in range(rows)
    ] or None


def with_plans(rows: Sequence[Row], config: Any, method: Method, where: Path | None = None) -> list[Row]:
    """Return the rows with the peak of a plan of their steps, in which the same layers are drawn."""
    first = rows[0]
    workload = Workload(
        config, method, 1, first.tokens, gradient_checkpointing=False, max_grad_norm=None, resting=first.resting,
        masters=first.masters if first.resting else None, resting_where=None if where is None else str(where),
    )  # fmt: skip
    trace = rehearse(workload, [row.active_layers for row in rows])
    most, planned = 0, []
    for row in rows:
        of_step = f"step {row.step + 1}:"
        peaks = [peak for phase, peak in trace.phases().items() if phase.startswith((of_step, "attach"))]
        most = max(most, *peaks)
        planned.append(replace(row, planned_bytes=most))
    return planned


def _step(model: Any, optimizer: Any, tokens: int, facts: dict[str, Any], number: int) -> Row:
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(model.config.vocab_size, (1, tokens), generator=generator)
    active, loss = optimizer.active_layers, torch.empty(())

    def forward() -> None:
        nonlocal loss
        loss = model(input_ids=ids, labels=ids).loss

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    seconds = seconds_of_parts((forward, lambda: loss.backward(), update), "cpu")
    value, before, anonymous = float(loss.detach()), facts.pop("before"), facts.pop("anonymous")
    peak: AnonymousPeak = facts.pop("peak")
    if not math.isfinite(value):
        raise RuntimeError(f"the loss of step {number} is {value}")
    return Row(
        **facts,
        step=number,
        active_layers=active,
        loss=value,
        forward_s=seconds[0],
        backward_s=seconds[1],
        optimizer_s=seconds[2],
        step_s=sum(seconds),
        resident_bytes=status_bytes("VmRSS"),
        peak_resident_bytes=status_bytes("VmHWM"),
        peak_growth_bytes=status_bytes("VmHWM") - before,
        peak_anonymous_growth_bytes=peak.bytes - anonymous,
        master_bytes_written=optimizer.master_bytes_written,
        code_bytes_read=optimizer.code_bytes_read,
    )


def in_words(row: Row) -> str:
    """Return the row as a line of text."""
    return (
        f"step {row.step}: layers {row.active_layers}, loss {row.loss:.3f}, forward {row.forward_s:.1f} s, "
        f"backward {row.backward_s:.1f} s, optimizer {row.optimizer_s:.1f} s, whole {row.step_s:.1f} s; resident "
        f"{row.resident_bytes / 1e9:.2f} GB, at the peak {row.peak_resident_bytes / 1e9:.2f} GB"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns 0, or 2 for a mistake in what was given."""
    return main_of("real_7b", "Time real training steps of a 7B geometry.", add_options, run, argv)


if __name__ == "__main__":
    sys.exit(main())
