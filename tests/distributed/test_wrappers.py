"""With two real processes, everything that could train on in silence and drift apart is refused on both."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import llama, tokens
from torch import nn

from distributed.ranks import on_ranks
from lisa_kernels import LISA, OwLore, attach

METHOD = LISA(active_layers=1, period=2)
LOW_RANK = OwLore(active_layers=1, rank=4, scores="uniform")


def ddp(model: Any) -> Any:
    return nn.parallel.DistributedDataParallel(model)


def fsdp1(model: Any) -> Any:
    from torch.distributed.fsdp import FullyShardedDataParallel

    # Slots that rest are empty, and frozen layers stand beside those that train.
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


def mesh() -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (2,))


def fsdp2(model: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    for block in model.model.layers:
        fully_shard(block, mesh=mesh())
    return fully_shard(model, mesh=mesh())


def tensor_parallel(model: Any) -> Any:
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    return parallelize_module(model, mesh(), {"model.layers.0.mlp.up_proj": ColwiseParallel()})


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "DDP": ddp, "FSDP1": fsdp1, "FSDP2": fsdp2, "tensor parallel": tensor_parallel,
}  # fmt: skip


def prepared(model: Any) -> Any:
    from accelerate import Accelerator

    return Accelerator(cpu=True).prepare(model)


def said(attempt: Callable[[], Any]) -> tuple[str, str]:
    """Return type and text of what an attempt raises, ("", "") where nothing is."""
    try:
        attempt()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def train_once(model: Any, wrapped: Any) -> None:
    wrapped(**tokens()).loss.backward()


def every_attempt(rank: int) -> dict[str, tuple[str, str]]:
    warnings.simplefilter("ignore")
    found = {}
    for name, wrap in WRAPPERS.items():
        found[f"attach after {name}"] = said(lambda: attach(wrap(llama()), METHOD, ranks=None))  # noqa: B023
    for name, wrap in {**WRAPPERS, "accelerate": prepared}.items():
        for kind, method in (("full-rank", METHOD), ("low-rank", LOW_RANK)):
            model = llama()
            attach(model, method, ranks=None)
            found[f"{name} after {kind} attach"] = said(lambda: train_once(model, wrap(model)))  # noqa: B023
    return found


@pytest.fixture(scope="module")
def attempts() -> list[dict[str, tuple[str, str]]]:
    return on_ranks(every_attempt)


REASONS = {
    "DDP": "called by DistributedDataParallel, which reduces the gradients that there were",
    "FSDP1": "FullyShardedDataParallel, DeepSpeed and their like put tensors of their own",
    "FSDP2": r"put under fully_shard \(FSDP2\) after the model was attached",
    "tensor parallel": r"up_proj\.(weight|slot) is a DTensor",
    "accelerate": "called by DistributedDataParallel",
    "attach after DDP": "wrapped in DistributedDataParallel, which fixes",
    "attach after FSDP1": "wrapped in FullyShardedDataParallel, which flattens",
    "attach after FSDP2": r"under fully_shard \(FSDP2\), and its ranks have to agree",
    "attach after tensor parallel": "is a DTensor, of which each process holds a part",
}


@pytest.mark.parametrize("attempt", sorted(REASONS))
def test_every_wrapper_is_refused_on_every_rank(attempt: str, attempts: list[dict[str, tuple[str, str]]]) -> None:
    """By the real classes, before and after attaching: one sentence with the reason and what works, and no hang."""
    for found in attempts:
        matching = {
            name: each for name, each in found.items() if name == attempt or name.startswith(f"{attempt} after")
        }
        assert matching
        for name, (kind, sentence) in matching.items():
            assert kind == "InputError", (name, kind, sentence)
            assert re.search(REASONS[attempt], sentence), (name, sentence)
            works = 'fully_shard first|ranks="auto"' if "FSDP2" in name else "bare model on every rank"
            assert re.search(works, sentence), (name, sentence)
            assert "\n" not in sentence
