"""Short runs of all methods, on one rank with the whole batch or on several with a part of it each."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from families import llama
from torch import Tensor, nn

from lisa_kernels import LISA, OWS, BAdam, FullFineTune, GaLore, LoRA, LoRAFA, OwLore, attach, checkpoint_blocks
from lisa_kernels.distributed.digests import digests
from lisa_kernels.methods import Method, SampledAdamW

VOCABULARY = 512
STEPS, ROWS, COLUMNS = 20, 4, 32

LOW_RANK = {"active_layers": 2, "period": 5, "rank": 8, "gap": 3}
METHODS: dict[str, tuple[Callable[[], Method], bool]] = {
    "LISA": (lambda: LISA(active_layers=2, period=5), False),
    "OWS, gradient norms": (lambda: OWS(active_layers=2, period=5, scores="gradient-norm"), False),
    "OwLore": (lambda: OwLore(**LOW_RANK), False),
    "OwLore, tied": (lambda: OwLore(**LOW_RANK), True),
    "OwLore, with first block": (lambda: OwLore(**{**LOW_RANK, "embeddings": "with-first-block"}), False),
    "OwLore, pages": (lambda: OwLore(**LOW_RANK, retired_state="page", embeddings="always"), False),
    "BAdam": (lambda: BAdam(period=5), False),
    "GaLore": (lambda: GaLore(rank=8, gap=5, embeddings="low-rank"), False),
    "LoRA": (lambda: LoRA(rank=8, embeddings="low-rank"), False),
    "LoRA-FA": (lambda: LoRAFA(rank=8), False),
    "full": (lambda: FullFineTune(), False),
}


def model_of(tied: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    return llama(tied=tied, vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128).to(dtype)


def batch(step: int, rank: int | None, count: int = 2) -> dict[str, Tensor]:
    """Return the rows of one rank, or of all of them joined."""
    generator = torch.Generator().manual_seed(1000 + step)
    ids = torch.randint(3, VOCABULARY, (ROWS * count, COLUMNS), generator=generator)
    if rank is not None:
        ids = ids[rank * ROWS : (rank + 1) * ROWS]
    return {"input_ids": ids, "labels": ids.clone()}


@dataclass
class Run:
    """What became of a run."""

    model: nn.Module
    optimizer: SampledAdamW
    losses: list[float] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    bases: dict[str, Tensor] = field(default_factory=dict)

    def state(self) -> dict[str, Tensor]:
        """Return every tensor that a next step depends on, by name."""
        found = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        for number, state in enumerate(self.optimizer.state.values()):
            found |= {f"state {number} {name}": value for name, value in state.items() if isinstance(value, Tensor)}
        return found

    def digests(self) -> list[int]:
        """Return a number for every tensor of `state`."""
        self.optimizer.state_dict()
        return digests(self.state().values()).tolist()


def train(
    method: Method, tied: bool, rank: int | None, *, steps: int = STEPS, accumulate: int = 1, sync_all: bool = False,
    dtype: torch.dtype = torch.float32, clip: bool = False, recompute: bool = False, alone: bool = False,
    prepare: Callable[[Any], Any] = lambda model: model, **settings: Any,
) -> Run:  # fmt: skip
    """Train on the rows of `rank`; of None, alone on all of them.

    clip: as loops clip, between backward and step. alone: on the rows of `rank` too, whatever others there are.
    prepare: what is done to the model before it is attached.
    """
    model = prepare(model_of(tied, dtype))
    if recompute:
        checkpoint_blocks(model)
    calibration = [batch(500 + (rank or 0), 0)]
    settings = {"lr": 3e-3, "max_grad_norm": None if clip else 1.0, "calibration": calibration, **settings}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = attach(model, method, ranks=None if rank is None or alone else "auto", **settings)
    run = Run(model, optimizer)
    for step in range(steps):
        for part in range(accumulate):
            last = part == accumulate - 1
            with nothing() if last or sync_all else optimizer.no_sync():
                loss = model(**batch(step * accumulate + part, rank)).loss / accumulate
                loss.backward()
            run.losses.append(float(loss.detach()))
        if step == 0:
            run.gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            run.bases = {n: b.clone() for n, b in model.named_buffers() if n.endswith("basis") and b.numel()}
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    return run


@contextmanager
def nothing() -> Iterator[None]:
    yield


@dataclass
class Difference:
    """How far a run of several ranks is from one rank's with the joined batches."""

    draws_equal: bool
    gradients: float
    overlap: float
    losses: float


def difference(ranked: Run, alone: Run) -> Difference:
    """Compare first gradients (relative), the spaces of first bases (1: the same) and losses (the mean over ranks)."""
    losses = torch.tensor(ranked.losses)
    dist.all_reduce(losses)
    assert ranked.gradients.keys() == alone.gradients.keys()
    assert ranked.bases.keys() == alone.bases.keys()
    # A slot's gradient depends on the turn of its basis, which is free; its product with the basis does not.
    gradients = [
        float((_whole(ranked, name) - _whole(alone, name)).norm() / _whole(alone, name).norm())
        for name in ranked.gradients
    ]
    overlaps = [
        float((basis.float() @ alone.bases[name].float().t()).norm() ** 2 / len(basis))
        for name, basis in ranked.bases.items()
    ]
    return Difference(
        ranked.optimizer.history == alone.optimizer.history,
        max(gradients),
        min(overlaps, default=1.0),
        float((losses / dist.get_world_size() - torch.tensor(alone.losses)).abs().max()),
    )


def _whole(run: Run, name: str) -> Tensor:
    gradient, basis = run.gradients[name], run.bases.get(name.removesuffix("slot") + "basis")
    return gradient.float() if basis is None or not name.endswith("slot") else gradient.t() @ basis.float()
