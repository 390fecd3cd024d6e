"""Under fully_shard the ranks' shards become what each rank's whole model would, for every method."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from distributed.ranks import on_ranks
from distributed.runs import METHODS, Run, train
from lisa_kernels.distributed import is_sharded, whole

QUICK = ["LISA", "OwLore"]
# Two switches and, in low rank, three refreshes of a basis.
STEPS = 12
SLOW = [name for name in METHODS if name not in QUICK]


def sharded(model: Any, **settings: Any) -> Any:
    """Share out a model as users do: each block, then what is around them."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, **settings)
    return fully_shard(model, mesh=mesh, **settings)


def own_parameters(run: Run) -> dict[str, torch.Tensor]:
    """Return the parameters that are the model's own."""
    return {
        name: param for name, param in run.model.named_parameters() if name.rpartition(".")[2] not in ("slot", "basis")
    }


def weights(run: Run) -> dict[str, torch.Tensor]:
    """Return the parameters of a run, whole; gathered by all ranks together."""
    return {name: whole(param.detach()) for name, param in run.model.named_parameters() if param.numel()}


def unequal(one: Run, other: Run) -> list[str]:
    """Return the names of parameters that differ in a bit."""
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    return [name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])]


def both(rank: int, names: list[str]) -> dict[str, dict[str, Any]]:
    """Train on shards and on whole models; each rank has rows of its own."""
    found = {}
    for name in names:
        make, tied = METHODS[name]
        shards = train(make(), tied, rank, dtype=torch.bfloat16, prepare=sharded, steps=STEPS)
        replicas = train(make(), tied, rank, dtype=torch.bfloat16, steps=STEPS)
        found[name] = {
            "unequal": unequal(shards, replicas),
            "history": shards.optimizer.history == replicas.optimizer.history,
            "losses": shards.losses == replicas.losses,
            "logits": shards.optimizer.forms_logits,
            "shards": all(map(is_sharded, own_parameters(shards).values())),
        }
    return found


def check(name: str, found: list[dict[str, dict[str, Any]]]) -> None:
    for each in found:
        assert each[name] == {"unequal": [], "history": True, "losses": True, "logits": False, "shards": True}


@pytest.fixture(scope="module")
def quick() -> list[dict[str, dict[str, Any]]]:
    return on_ranks(both, QUICK)


@pytest.mark.parametrize("name", QUICK)
def test_shards_become_what_whole_models_do(name: str, quick: list[dict[str, dict[str, Any]]]) -> None:
    """Bit for bit in bfloat16 over switches and refreshes, stochastic rounding and clipping included."""
    check(name, quick)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_shards_of_other_methods_become_what_whole_models_do(name: str) -> None:
    check(name, on_ranks(both, [name]))
