"""Bases of gradients: what they hold, what they take, and what that does to the steps of a run.

quality   energy that first and refreshed bases keep over what the exact SVD of the same rank keeps, on gradients of
          a small language model in training, beside a basis that is not refreshed and a random one
speed     seconds for one matrix of Llama-2-7B (4096 × 11008, rank 128, 1024 tokens), whole and in parts
exact     seconds of the exact SVD that GaLore takes of each matrix, at that size (minutes) or smaller
steps     the longest step of a run over the median one, with switches, first bases and refreshes
ablation  what carrying the moments into a new basis is worth (bench/basis_ablation.py)

python -m bench.basis quality speed            # prints; with --record also appends to results/basis.jsonl
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench.basis_ablation import ablation
from bench.basis_steps import steps
from bench.numerics import batches
from bench.rows import append_row
from bench.timing import seconds_per_call
from lisa_kernels.basis import FactoredGradient, RandomRows, first_basis, orthonormal_rows, random_basis, refresh_basis
from lisa_kernels.basis.orthonormal import leading_rows, nearest_turn
from lisa_kernels.train.models import load_model

RANKS = (8, 16, 32)
RECORDED_STEPS = (0, 5, 10, 20, 40)
M, N, RANK, TOKENS = 4096, 11008, 128, 1024

Row = dict[str, Any]


# Quality


def energy(basis: Tensor, gradient: Tensor) -> float:
    """Return the energy that the basis keeps over what the best basis of its rank keeps."""
    kept = (basis.double() @ gradient.double().t()).square().sum()
    return float(kept / torch.linalg.svdvals(gradient.double())[: len(basis)].square().sum())


def record_gradients(model: Any, data: Iterator[dict[str, Tensor]], at: tuple[int, ...]) -> list[dict[str, Tensor]]:
    """Train `model` and return the gradients of its blocks' matrices at the steps `at`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.01)
    recorded = []
    for step, batch in zip(range(max(at) + 1), data):
        model(**batch, use_cache=False).loss.backward()
        if step in at:
            named = ((name, param.grad) for name, param in model.named_parameters() if ".layers." in name)
            recorded.append({name: grad.clone() for name, grad in named if grad is not None and grad.dim() == 2})
        optimizer.step()
        optimizer.zero_grad()
    return recorded


def energies(recorded: list[dict[str, Tensor]], rank: int) -> dict[str, list[float]]:
    """Return the energies over all matrices and times but the first of four kinds of basis.

    "refreshed" is followed from the first record on, refreshed once at each; "kept" stays as it was found there.
    """
    found: dict[str, list[float]] = {"first": [], "refreshed": [], "kept": [], "random": []}
    for index, name in enumerate(recorded[0]):
        source = RandomRows(index)
        kept = refreshed = first_basis(recorded[0][name], rank, source)
        for gradients in recorded[1:]:
            gradient = gradients[name]
            refreshed = refresh_basis(gradient, refreshed, source)
            bases = {
                "first": first_basis(gradient, rank, source),
                "refreshed": refreshed,
                "kept": kept,
                "random": random_basis(rank, gradient.shape[1], source, gradient.device),
            }
            for kind, basis in bases.items():
                found[kind].append(energy(basis, gradient))
    return found


def quality() -> list[Row]:
    """Return a row for each rank: least and mean energy of each kind of basis on `preset:tiny`'s gradients."""
    model = load_model("preset:tiny", torch.float32, 0)
    recorded = record_gradients(model, batches(model), RECORDED_STEPS)
    rows = []
    for rank in RANKS:
        row: Row = {"case": "quality", "model": "preset:tiny", "rank": rank, "steps": RECORDED_STEPS[1:]}
        for kind, values in energies(recorded, rank).items():
            row[kind] = {"least": min(values), "mean": statistics.fmean(values)}
        rows.append(row)
    return rows


# Speed


def _factors(device: str) -> FactoredGradient:
    """Return random factors with a spectrum that falls as gradients' do."""
    generator = torch.Generator().manual_seed(0)
    decay = (1 + torch.arange(TOKENS)[:, None]) ** -0.5
    dy = torch.randn(TOKENS, M, generator=generator) * decay
    return FactoredGradient(dy.to(device), torch.randn(TOKENS, N, generator=generator).to(device))


def _best(call: Callable[[], object], device: str, repeats: int = 3) -> float:
    call()
    return min(seconds_per_call(call, device) for _ in range(repeats))


def speed(device: str) -> list[Row]:
    """Return the row of first basis and refresh, through the factors and formed, and of their parts."""
    factored = _factors(device)
    gradient = factored.formed()
    source = RandomRows(0)
    basis = first_basis(factored, RANK, source)
    other = random_basis(RANK, N, source, gradient.device)
    calls: dict[str, Callable[[], object]] = {
        "first, through factors": lambda: first_basis(factored, RANK, source),
        "first, of a formed gradient": lambda: first_basis(gradient, RANK, source),
        "refresh, through factors": lambda: refresh_basis(factored, basis, source),
        "refresh, of a formed gradient": lambda: refresh_basis(gradient, basis, source),
        "part: forming the gradient": factored.formed,
        "part: product with a formed gradient": lambda: basis @ gradient.t(),
        "part: product through factors": lambda: (basis @ factored.x.t()) @ factored.dy,
        "part: orthonormal rows": lambda: orthonormal_rows(other),
        "part: leading rows": lambda: leading_rows(other, RANK),
        "part: nearest turn": lambda: nearest_turn(basis, other),
        "instead: Householder QR": lambda: torch.linalg.qr(other.t()),
        "instead: SVD of [r, r]": lambda: torch.linalg.svd(other @ basis.t()),
    }
    seconds = {name: _best(call, device) for name, call in calls.items()}
    return [{"case": "speed", "m": M, "n": N, "rank": RANK, "tokens": TOKENS, "seconds": seconds}]


def exact(shrink: int, device: str) -> list[Row]:
    """Return the row of the exact SVD (the call of GaLore's projector) at 1/shrink of the sides; one run."""
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(M // shrink, N // shrink, generator=generator).to(device)
    begin = time.process_time()
    seconds = seconds_per_call(lambda: torch.linalg.svd(gradient, full_matrices=False), device)
    cpu_seconds = time.process_time() - begin
    m, n = gradient.shape
    return [{"case": "exact", "m": m, "n": n, "seconds": seconds, "cpu_seconds": cpu_seconds}]


def show(row: Row) -> None:
    """Print one row."""
    print(", ".join(f"{key} {value}" for key, value in row.items() if not isinstance(value, dict)))
    for key, value in row.items():
        if isinstance(value, dict):
            for name, number in value.items():
                print(f"    {key}: {name} {number:.4g}")


def main() -> None:
    """Run the cases named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", choices=("quality", "speed", "exact", "steps", "ablation"))
    parser.add_argument("--record", action="store_true", help="append the rows to results/basis.jsonl")
    parser.add_argument("--device", default="cpu", help="of speed and exact: cpu or cuda")
    parser.add_argument("--shrink", type=int, default=1, help="of exact: divide both sides by this")
    parser.add_argument("--threads", type=int, help="threads of torch (default: torch's own choice)")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    runs: dict[str, Callable[[], list[Row]]] = {
        "quality": quality,
        "speed": lambda: speed(arguments.device),
        "exact": lambda: exact(arguments.shrink, arguments.device),
        "steps": steps,
        "ablation": lambda: ablation(arguments.record),
    }
    for case in arguments.cases:
        for row in runs[case]():
            show(row)
            # The ablation, which takes long, records each row as it comes.
            if arguments.record and case != "ablation":
                append_row("basis", row)


if __name__ == "__main__":
    main()
