"""Peak memory of every method: planned on 7-8B models, planned and measured on a small one, beside their peers.

    python -m bench.memory                      # all methods and peers on Llama-2-7B, Llama-3.1-8B and a small model
    python -m bench.memory --models llama-2-7b --methods owlore-frozen,peft-qlora
    python -m bench.memory --record --plot bench/results/memory.png

A plan rehearses the real training step on tensors without values, peers' steps with the same tracker. On the small
model the same steps run with real tensors on the CPU as well, and must take the same bytes. Weights at rest are planned
for a GPU, whose workspaces count and masters in host memory do not; on the small model, where host and device are one,
both do.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.command import main_of, positive, table_console
from bench.memory_runs import PEERS, Peer, measured, measured_peer, planned_peer
from bench.plots import check_picture, parts_of, plot_memory
from bench.rows import append_row
from bench.step_contestants import reason_of
from lisa_kernels import LISA, BAdam, FullFineTune, GaLore, LoRA, LoRAFA, OwLore
from lisa_kernels.errors import unknown_name
from lisa_kernels.methods import Method
from lisa_kernels.plan.gpu_memory import GpuMemory
from lisa_kernels.plan.rehearsal import Workload, rehearse
from lisa_kernels.plan.trace import Trace

MODELS = ("llama-2-7b", "llama-3.1-8b", "tiny")
MEASURED = ("tiny",)
# Of methods with a rank that the small model does not have.
SMALL_RANK, RANK = 32, 128
# In what weights rest, of methods beside which they do.
RESTING = {"lora-int8": "int8", "lora-nf4": "nf4", "galore-32-nf4": "nf4"}


def _methods(rank: int) -> dict[str, tuple[str, Method]]:
    def owlore(embeddings: str) -> Method:
        return OwLore(5, rank=rank, embeddings=embeddings, scores="uniform")

    return {
        "owlore-frozen": ("OwLore, embeddings frozen", owlore("frozen")),
        "owlore-low-rank": ("OwLore, embeddings low-rank", owlore("low-rank")),
        "owlore-always": ("OwLore, embeddings always", owlore("always")),
        "owlore-wide": (
            "OwLore, two thirds of the layers, r = 32",
            OwLore(21 if rank == RANK else 5, rank=32, scores="uniform"),
        ),
        "lisa-frozen": ("LISA, embeddings frozen", LISA(embeddings="frozen")),
        "lisa": ("LISA, embeddings always", LISA()),
        "badam-ours": ("BAdam()", BAdam()),
        "lora": ("LoRA(rank=16), embeddings low-rank", LoRA(rank=16, embeddings="low-rank")),
        **{
            f"lora-{kind}": (
                f"LoRA(rank=16), embeddings low-rank, at rest in {kind}",
                LoRA(rank=16, embeddings="low-rank"),
            )
            for kind in ("int8", "nf4")
        },
        "lora-fa": ("LoRAFA()", LoRAFA()),
        "galore-32": ("GaLore(rank=32), embeddings low-rank", GaLore(rank=32, embeddings="low-rank")),
        "galore-32-nf4": (
            "GaLore(rank=32), embeddings low-rank, at rest in nf4",
            GaLore(rank=32, embeddings="low-rank"),
        ),
        "galore": ("GaLore()", GaLore(rank=rank)),
        "full": ("FullFineTune()", FullFineTune()),
    }


@dataclass(frozen=True)
class Row:
    """One method on one model: the most bytes alive at once by plan, what they are, and those of a real run."""

    name: str
    method: str
    peer: bool
    model: str
    batch: int
    seq_len: int
    dtype: str
    gradient_checkpointing: bool
    planned_bytes: int | None
    measured_bytes: int | None
    split: dict[str, int] | None
    phase: str | None
    plan_s: float | None
    reason: str | None


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add = parser.add_argument
    add("--models", default=",".join(MODELS), help="presets, several with commas; tiny is measured too")
    add(
        "--methods", default="all", help=f"{', '.join(_methods(RANK))}, {', '.join(PEERS)}; several with commas, or all"
    )
    add("--batch", type=int, default=1, help="rows")
    add("--seq-len", type=int, default=1024, help="tokens per row")
    add("--dtype", default="bf16", help="of the weights of models that are only planned; measured ones are fp32")
    add("--no-checkpointing", action="store_true", help="keep all activations")
    add("--plot", type=Path, help="draw the planned peaks as stacked bars into this file (.png, .svg, .pdf)")
    add("--record", action="store_true", help="append the rows to bench/results/memory.jsonl")
    add("--json", action="store_true", help="print the result as JSON on standard output")
    add("--debug", action="store_true", help="show tracebacks")


def run(arguments: argparse.Namespace, console: Console) -> list[Row]:
    """Plan, and on small models measure, every method on every model; returns a row for each."""
    for name in ("batch", "seq_len"):
        positive(name.replace("_", "-"), getattr(arguments, name))
    if arguments.plot is not None:
        check_picture(arguments.plot)
    rows = []
    for model in parse(arguments.models, MODELS, "model"):
        rank = SMALL_RANK if model in MEASURED else RANK
        methods = _methods(rank)
        for name in parse(arguments.methods, [*methods, *PEERS], "method"):
            title, method = methods.get(name, (name, methods["galore"][1]))
            workload = Workload(
                f"preset:{model}", method, arguments.batch, arguments.seq_len,
                dtype="fp32" if model in MEASURED else arguments.dtype,
                gradient_checkpointing=not arguments.no_checkpointing, resting=RESTING.get(name),
            )  # fmt: skip
            console.print(f"{model}: {title}", highlight=False)
            row = _row(name, title, model, workload)
            rows.append(row)
            if arguments.record:
                append_row("memory", {**asdict(row), "ran_on": "cpu"})
    print_rows(rows)
    if arguments.plot is not None:
        plot_memory(
            [asdict(row) for row in rows if row.model not in MEASURED] or [asdict(r) for r in rows], arguments.plot
        )
    return rows


def parse(text: str, known: Sequence[str], what: str) -> list[str]:
    """Return the names in `text`, all of them for "all"; InputError for one that is not known."""
    names = [part.strip() for part in text.split(",")]
    for name in names:
        if name not in known and name != "all":
            raise unknown_name(what, name, [*known, "all"])
    return [name for name in known if name in names or "all" in names]


def _row(name: str, title: str, model: str, workload: Workload) -> Row:
    peer = PEERS.get(name)
    begin = time.perf_counter()
    gpu = GpuMemory.here() if workload.resting is not None and model not in MEASURED else None
    trace, reason = _trace(lambda: rehearse(workload, gpu=gpu) if peer is None else planned_peer(peer, workload), peer)
    seconds = time.perf_counter() - begin
    real = None
    if model in MEASURED and trace is not None:
        real, reason = _trace(lambda: measured(workload) if peer is None else measured_peer(peer, workload), peer)
    return Row(
        name, title if peer is None else peer.title, peer is not None, model,
        workload.batch_size, workload.seq_len, workload.dtype, workload.gradient_checkpointing,
        None if trace is None else trace.peak_bytes, None if real is None else real.peak_bytes,
        None if trace is None else trace.live_at(trace.peak_index),
        None if trace is None else trace.events[trace.peak_index].phase,
        None if trace is None else seconds, reason,
    )  # fmt: skip


def _trace(make: Callable[[], Trace], peer: Peer | None) -> tuple[Trace | None, str | None]:
    """Return the trace, or of a peer that cannot run the reason."""
    try:
        with _quiet(peer):
            return make(), None
    except Exception as error:
        if peer is None:
            raise
        return None, reason_of(error)


@contextlib.contextmanager
def _quiet(peer: Peer | None) -> Iterator[None]:
    """Keep what peers print, and warn of, to themselves."""
    if peer is None:
        yield
        return
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def print_rows(rows: Sequence[Row]) -> None:
    """Print the rows as a table."""
    table = Table("model", "method", box=None)
    for column in ("planned, GB", "measured, GB", "weights", "gradients", "state, bases", "activations, loss", "rest"):
        table.add_column(column, justify="right")
    for row in rows:
        if row.split is None:
            table.add_row(row.model, row.method, row.reason)
            continue
        measured_gb = "" if row.measured_bytes is None else f"{row.measured_bytes / 1e9:.6g}"
        table.add_row(row.model, row.method, f"{(row.planned_bytes or 0) / 1e9:.6g}", measured_gb, *(
            f"{part / 1e9:.2f}" for part in parts_of(row.split).values()
        ))  # fmt: skip
    table_console().print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns 0, or 2 for a mistake in what was given."""
    return main_of("memory", "Plan and measure the peak memory of every method.", add_options, run, argv)


if __name__ == "__main__":
    sys.exit(main())
