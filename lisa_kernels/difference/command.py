"""`lisa-kernels difference`: a tuned model as a small adapter beside its base."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from lisa_kernels.difference.adapter import TOKENIZER_FILES, whole_bytes, write_difference
from lisa_kernels.difference.changes import Changes, differences, find_changes, folder_of
from lisa_kernels.difference.checkpoints import Checkpoint
from lisa_kernels.difference.factors import Factors, factorize, factorize_to, share_out
from lisa_kernels.errors import InputError
from lisa_kernels.layers import quantised_by
from lisa_kernels.methods.peft_folder import check_replaceable
from lisa_kernels.progress import progress_bar
from lisa_kernels.train.configs import load_config, locate, stored_config

DEFAULT_RANK = 64


@dataclass(frozen=True)
class DifferenceOptions:
    """Options of `lisa-kernels difference`, one field a flag; see its help for units and defaults."""

    base: str
    tuned: str
    output: Path
    rank: int | None = None
    keep: float | None = None
    share: float | None = None
    matrices_only: bool = False

    def __post_init__(self) -> None:
        given = [name for name in ("rank", "keep", "share") if getattr(self, name) is not None]
        if len(given) > 1:
            raise InputError(f"--{given[0]} and --{given[1]} both say how large the adapter is; give one of them.")
        if self.rank is not None and self.rank < 1:
            raise InputError(f"--rank is {self.rank}; at least 1 is wanted.")
        for name in ("keep", "share"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise InputError(f"--{name} is {value}; a share between 0 and 1 is wanted.")


def write(options: DifferenceOptions, console: Console) -> dict[str, Any]:
    """Write the adapter and return what it holds.

    energy: share of the squares of all matrices' differences that the factors hold; bytes and share: of the adapter's
    weights, and of the tuned model's. whole: modules that are kept as they are; left_out: those that changed and are
    not in the adapter. Raises InputError for two checkpoints that are not of one model.
    """
    folder = options.output.expanduser().resolve()
    check_replaceable(folder, TOKENIZER_FILES)
    for spec in (options.base, options.tuned):
        if quantised_by(stored_config(spec)) is not None:
            raise InputError(
                f"{spec} is stored in bitsandbytes' codes, and weights of 16 or 32 bits are compared: load it, call "
                "lisa_kernels.dequantize(model) and save_pretrained, and give that folder."
            )
    config = load_config(options.tuned)
    base_folder, tuned_folder = (folder_of(spec, locate(spec)) for spec in (options.base, options.tuned))
    with Checkpoint(base_folder) as base, Checkpoint(tuned_folder) as tuned:
        changes = find_changes(base, tuned, config)
        found = _factors(options, base, tuned, changes, console)
        factors = _shared_out(options, tuned, changes, found)
        name = options.base if locate(options.base) is None else str(base_folder)
        size = write_difference(folder, name, changes, factors, tuned, not options.matrices_only)
        result = {**_result(options, changes, found, factors), "bytes": size, "share": size / tuned.nbytes}
    _tell(result, folder, console)
    return result


def _factors(
    options: DifferenceOptions, base: Checkpoint, tuned: Checkpoint, changes: Changes, console: Console
) -> dict[str, Factors]:  # fmt: skip
    """Return the factors of every changed matrix, of a share twice what each would have if all had the same rank."""
    rank, costs = options.rank or DEFAULT_RANK, sum(sum(tuned.shape(f"{path}.weight")) for path in changes.linears)
    if options.share is not None:
        rank = max(1, 2 * _numbers(options, tuned, changes) // max(costs, 1))
    found = {}
    with progress_bar("matrices", changes.linears, console) as advance:
        for path, more in differences(base, tuned, changes):
            found[path] = factorize(more, rank) if options.keep is None else factorize_to(more, options.keep)
            advance()
    return found


def _shared_out(
    options: DifferenceOptions, tuned: Checkpoint, changes: Changes, found: dict[str, Factors]
) -> dict[str, Factors]:  # fmt: skip
    if options.share is None:
        return found
    ranks = share_out(found, _numbers(options, tuned, changes))
    return {path: found[path].cut(rank) for path, rank in ranks.items() if rank}


def _numbers(options: DifferenceOptions, tuned: Checkpoint, changes: Changes) -> int:
    """Return how many numbers the factors may take for `--share` of the model's bytes."""
    assert options.share is not None
    left = options.share * tuned.nbytes - (0 if options.matrices_only else whole_bytes(changes, tuned))
    numbers = int(left) // max((tuned.dtype(f"{path}.weight").itemsize for path in changes.linears), default=1)
    smallest = min((sum(tuned.shape(f"{path}.weight")) for path in changes.linears), default=0)
    if numbers < smallest:
        raise InputError(
            f"--share {options.share:g} of {tuned.nbytes / 1e6:.1f} MB leaves {max(left, 0) / 1e6:.1f} MB for matrices "
            f"beside what changed as a whole ({', '.join(changes.whole[:2]) or 'nothing'}); give a larger share, or "
            "--matrices-only."
        )
    return numbers


def _result(
    options: DifferenceOptions, changes: Changes, found: dict[str, Factors], factors: dict[str, Factors]
) -> dict[str, Any]:  # fmt: skip
    energy = sum(each.energy for each in found.values())
    ranks = [each.rank for each in factors.values()]
    beside = [*changes.whole, *(f"{path}.bias" for path in changes.biases)]
    return {
        "base": options.base, "tuned": options.tuned, "adapter": str(options.output), "matrices": len(factors),
        "rank": [min(ranks, default=0), max(ranks, default=0)],
        "energy": sum(each.kept(each.rank) for each in factors.values()) / energy if energy else 1.0,
        "whole": [] if options.matrices_only else beside,
        "left_out": [*(beside if options.matrices_only else []), *(path for path in found if path not in factors)],
    }  # fmt: skip


def _tell(result: dict[str, Any], folder: Path, console: Console) -> None:
    low, high = result["rank"]
    ranks, whole, left_out = (
        f"rank {low}" if low == high else f"ranks {low} to {high}",
        result["whole"],
        result["left_out"],
    )
    said = [
        f"adapter in {folder}: {result['bytes'] / 1e6:.1f} MB, {result['share']:.1%} of the model; "
        f"{result['matrices']} matrices of {ranks} hold {result['energy']:.2%} of the squares of what changed in all"
    ]
    if whole:
        said.append(
            f"note: {len(whole)} modules or biases are kept whole (first: {whole[0]}); some servers take no such "
            "adapter: --matrices-only leaves them out"
        )
    if low != high:
        said.append(
            "note: ranks differ from matrix to matrix; what takes alpha over a matrix's own rank for its scale, as "
            "llama.cpp does, wants one rank: use --rank there"
        )
    if left_out:
        said.append(f"note: {len(left_out)} changed modules are not in the adapter (first: {left_out[0]})")
    for line in said:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
