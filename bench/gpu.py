"""Everything that the owner of a GPU can tell us, in one command and one file: `make gpu`.

    python -m bench.gpu                       # writes runs/gpu-report.md; meant to take a quarter of an hour
    python -m bench.gpu --device cpu --small  # the same on the CPU, in a minute

First what would make the rest meaningless: is there a GPU, do the kernels compile, are their results the CPU's? The
report ends at the first of these that is not so. Then the methods beside the CPU, memory beside its plan, the tests
that take a device, and times.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import torch
from rich.console import Console

from bench.gpu_report import DONE, FAILED, LEFT_OUT, STOPPED, Report, head_of, troubles
from bench.memory_runs import measured
from bench.peers import DTYPES
from bench.rows import environment
from bench.step_cases import Case
from lisa_kernels import LISA, BAdam, FullFineTune, GaLore, LoRAFA, OwLore, attach
from lisa_kernels.cli import USAGE_ERROR
from lisa_kernels.devices import choose_device, survey_machine
from lisa_kernels.errors import InputError
from lisa_kernels.info import NAMES, describe
from lisa_kernels.methods import Method
from lisa_kernels.ops.capability import auto_dtype, check_capability
from lisa_kernels.plan.gpu_memory import GpuMemory
from lisa_kernels.plan.rehearsal import Workload, rehearse
from lisa_kernels.plan.result import Plan
from lisa_kernels.trial import try_kernels

ROOT = Path(__file__).parents[1]
# A loss on the GPU may differ from the CPU's in float32 by so much of itself after a few steps, by its weights' dtype.
APART = {"fp32": 1e-2, "bf16": 5e-2, "fp16": 5e-2}
# Of the plan, what the allocator may have handed out more.
KEPT = 0.02
# Of one folder, and of one benchmark.
TEST_SECONDS, TIMES_SECONDS = 240, 150
FAILURES_SHOWN = 30


class Sizes(NamedTuple):
    """How much of each stage is done."""

    steps: int
    methods: tuple[str, ...]
    memory: tuple[str, ...]
    model: str
    seq_len: int
    tests: tuple[str, ...]
    test_options: tuple[str, ...]
    times: dict[str, tuple[str, ...]]


MATRIX: dict[str, Method] = {
    "owlore": OwLore(active_layers=2, period=3, rank=16, scores="uniform"),
    "owlore frozen": OwLore(active_layers=2, period=3, rank=16, scores="uniform", embeddings="frozen"),
    "owlore paged": OwLore(active_layers=2, period=3, rank=16, scores="uniform", retired_state="page"),
    "lisa": LISA(active_layers=2, period=3),
    "lisa low-rank": LISA(active_layers=2, period=3, embeddings="low-rank", rank=16),
    "badam": BAdam(period=3),
    "galore": GaLore(rank=16, gap=3),
    "lora-fa": LoRAFA(rank=8),
    "full": FullFineTune(),
}
# By the fields of the plan's workload.
MEMORY: dict[str, tuple[Method, str | None]] = {
    "owlore": (OwLore(active_layers=5, rank=64, scores="uniform"), None),
    "lisa": (LISA(active_layers=2), None),
    "galore": (GaLore(rank=64), None),
    "full, paged": (FullFineTune(), "host"),
}
WHOLE = Sizes(
    steps=8, methods=tuple(MATRIX), memory=tuple(MEMORY), model="preset:tinyllama-1.1b", seq_len=512,
    tests=("tests/ops", "tests/optim", "tests/paging", "tests/methods", "tests/test_trial.py"),
    test_options=("--numprocesses=4",),
    times={
        "optimizer": ("--sizes=2^16,2^20,2^24,2^26", "--small-tensors", "--rounds=10"),
        "lowrank": ("--shapes=4096x4096,4096x11008", "--rounds=5"),
        "step": ("--dtype=auto", "--rounds=4"),
    },
)  # fmt: skip
SMALL = Sizes(
    steps=2, methods=("owlore",), memory=("owlore",), model="preset:tiny", seq_len=32,
    tests=("tests/test_trial.py",), test_options=(),
    times={"optimizer": ("--sizes=2^12", "--rounds=5", "--peers=none", "--dtype=fp32")},
)  # fmt: skip
GEOMETRY = Case(layers=4, width=128, intermediate=256, heads=4, vocabulary=512, batch=2, seq_len=64)


@dataclass
class Run:
    """What every stage works with; `ends` is a moment of `time.monotonic`."""

    device: torch.device
    sizes: Sizes
    report: Report
    ends: float

    def seconds_left(self, at_most: float) -> float:
        """Return how long something may take."""
        return min(at_most, self.ends - time.monotonic())


class Meaningless(Exception):  # noqa: N818 (it ends a report, and is no mistake)
    """What was found makes all that follows meaningless."""


def machine(run: Run) -> None:
    """Say what is here; without a GPU that kernels run on there is nothing to report."""
    run.report.add("machine", **describe(), environment=environment())
    try:
        check_capability(choose_device(str(run.device), survey_machine()))
    except InputError as error:
        raise Meaningless(str(error)) from error


def kernels(run: Run) -> None:
    """Compile and run every kernel once, the optimizer's steps among them."""
    trials = try_kernels(run.device)
    for trial in trials:
        run.report.add("kernel", **trial._asdict())
    wrong = [f"{trial.op}: {trial.problem}" for trial in trials if trial.problem]
    if wrong:
        raise Meaningless(f"kernels do not run here, or not rightly ({wrong[0]})")


def methods(run: Run) -> None:
    """Train a small model by each method, in the dtypes that a run may have here, beside the CPU in float32."""
    for name in run.sizes.methods:
        wanted, _ = _losses(MATRIX[name], "fp32", torch.device("cpu"), run.sizes.steps)
        for dtype in dict.fromkeys((NAMES[auto_dtype(run.device)], "fp32")):
            try:
                losses, seconds = _losses(MATRIX[name], dtype, run.device, run.sizes.steps)
                apart = max(abs(one - other) / abs(other) for one, other in zip(losses, wanted))
                far = not all(map(math.isfinite, losses)) or apart > APART[dtype]
                problem = f"losses {losses} are not the CPU's {wanted}" if far else ""
            except Exception as error:
                losses, seconds, apart, problem = [], 0.0, math.nan, _in_a_line(error)
            run.report.add(
                "method", name=name, dtype=dtype, losses=losses, cpu_losses=wanted, largest_difference=apart,
                ms_per_step=seconds * 1e3, problem=problem,
            )  # fmt: skip


def _losses(method: Method, dtype: str, device: torch.device, steps: int) -> tuple[list[float], float]:
    """Return the losses of some steps on one batch, and the seconds of the last one."""
    case = Case(**{**vars(GEOMETRY), "device": str(device), "dtype": dtype})
    model, batch = case.model(), case.tokens_and_labels()
    optimizer = attach(model, method, lr=1e-3)
    losses, begin = [], 0.0
    for _ in range(steps):
        begin = time.perf_counter()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, time.perf_counter() - begin


def memory(run: Run) -> None:
    """Take the steps that a plan rehearses, and compare torch's allocator with it."""
    dtype = NAMES[auto_dtype(run.device)]
    for name in run.sizes.memory:
        method, paging = MEMORY[name]
        workload = Workload(
            run.sizes.model, method, batch_size=1, seq_len=run.sizes.seq_len, dtype=dtype, paging=paging
        )
        try:
            facts = _beside_plan(workload, run.device)
        except Exception as error:
            facts = {"planned_bytes": 0, "measured_bytes": 0, "reserved_bytes": 0, "problem": _in_a_line(error)}
        run.report.add("memory", name=name, model=run.sizes.model, dtype=dtype, **facts)


def _beside_plan(workload: Workload, device: torch.device) -> dict[str, int | str]:
    if device.type == "cpu":
        found, reserved, planned = measured(workload, device).peak_bytes, 0, rehearse(workload).peak_bytes
    else:
        planned = Plan(workload, rehearse(workload, gpu=GpuMemory.here())).allocated_bytes
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        measured(workload, device)
        found, reserved = torch.cuda.max_memory_allocated(device) - before, torch.cuda.max_memory_reserved(device)
    excess = found / planned - 1
    problem = f"{excess:+.2%} measured above planned" if excess > KEPT else ""
    return {"planned_bytes": planned, "measured_bytes": found, "reserved_bytes": reserved, "problem": problem}


def tests(run: Run) -> None:
    """Run the tests that take a device, on this one, folder by folder: what ends too late costs no other's result."""
    _each(run.sizes.tests, lambda path: _tests_in(path, run))


def _tests_in(path: str, run: Run) -> None:
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tests.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-k", run.device.type, f"--junitxml={file}"]
        _call([*command, *run.sizes.test_options, path], run.seconds_left(TEST_SECONDS))
        cases = [*ElementTree.parse(file).iter("testcase")] if file.exists() else []
    if not cases:
        raise RuntimeError("pytest wrote no result")
    red = [(case, found) for case in cases for found in case if found.tag in ("failure", "error")]
    skipped = sum(any(found.tag == "skipped" for found in case) for case in cases)
    failures = [
        {"test": f"{case.get('classname')}::{case.get('name')}", "message": _in_a_line(found.get("message") or "")}
        for case, found in red[:FAILURES_SHOWN]
    ]
    run.report.add(
        "tests", path=path, passed=len(cases) - len(red) - skipped, failed=len(red), skipped=skipped,
        seconds=time.monotonic() - begin, failures=failures,
    )  # fmt: skip


def times(run: Run) -> None:
    """Run the benchmarks, with the peers that are installed."""
    _each(run.sizes.times, lambda name: _times_of(name, run))


def _times_of(name: str, run: Run) -> None:
    auto = NAMES[auto_dtype(run.device)]
    dtype = auto if auto in DTYPES else "fp32"
    given = [option.replace("--dtype=auto", f"--dtype={dtype}") for option in run.sizes.times[name]]
    command = [sys.executable, "-m", f"bench.{name}", f"--device={run.device.type}", "--json", *given]
    for row in json.loads(_call(command, run.seconds_left(TIMES_SECONDS)))["rows"]:
        run.report.add("time", bench=name, **row)


def _each(names: Iterable[str], act: Callable[[str], None]) -> None:
    """Do all of it, and raise at the end for what could not be done."""
    problems = []
    for name in names:
        try:
            act(name)
        except Exception as error:
            problems.append(f"{name}: {_in_a_line(error)}")
    if problems:
        raise RuntimeError("; ".join(problems))


def _call(command: Sequence[str], seconds: float) -> str:
    """Run a program from the sources; returns what it wrote. Raises where it takes longer, or has no result."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=max(1.0, seconds), check=False)
    if done.returncode and not done.stdout:
        raise RuntimeError(f"{command[2]} ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    return done.stdout


def _in_a_line(what: BaseException | str) -> str:
    kind = "" if isinstance(what, str) else f"{type(what).__name__}: "
    return kind + " ".join(str(what).split())[:300]


STAGES: tuple[Callable[[Run], None], ...] = (machine, kernels, methods, memory, tests, times)


def report(run: Run, console: Console, stages: Sequence[Callable[[Run], None]] = STAGES) -> None:
    """Run the stages into the report, to the end or to the first that makes the rest meaningless."""
    for stage in stages:
        begin, outcome, reason = time.monotonic(), DONE, ""
        if run.seconds_left(1.0) < 1.0:
            outcome, reason = LEFT_OUT, "the time was over"
        else:
            console.print(f"{stage.__name__} …", highlight=False)
            try:
                stage(run)
            except Meaningless as found:
                outcome, reason = STOPPED, str(found)
            except Exception as error:  # whatever it is, it is part of what is found
                outcome, reason = FAILED, _in_a_line(error)
        seconds = time.monotonic() - begin
        run.report.add("stage", name=stage.__name__, seconds=seconds, outcome=outcome, reason=reason)
        if outcome == STOPPED or (outcome == FAILED and stage in (machine, kernels)):
            break
    run.report.add("end")


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report; returns 0 where nothing is wrong, 1 where something is, 2 for a mistake in what was given."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description="Report on a GPU, in one file.")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu (default: cuda)")
    parser.add_argument("--small", action="store_true", help="little of each part, to try the command")
    parser.add_argument("--minutes", type=float, default=14.0, help="what is not begun by then is left out")
    parser.add_argument("--output", type=Path, default=ROOT / "runs/gpu-report.md", help="the file")
    given = parser.parse_args(argv)
    console = Console(stderr=True)
    try:
        device = torch.device(given.device)
    except RuntimeError:
        console.print(f"bench.gpu: --device {given.device} is no device; give cuda, cuda:N or cpu.", highlight=False)
        return USAGE_ERROR
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
    run = Run(device, SMALL if given.small else WHOLE, Report(given.output), time.monotonic() + 60 * given.minutes)
    report(run, console)
    print("\n".join(head_of(run.report.rows)))
    console.print(f"\nall of it, to be sent: {given.output}", highlight=False, soft_wrap=True)
    return 1 if troubles(run.report.rows) else 0


if __name__ == "__main__":
    sys.exit(main())
