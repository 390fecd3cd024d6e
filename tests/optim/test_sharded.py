"""The optimizer on sharded parameters takes the steps of whole ones, and its state can become any ranks'."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distributed.ranks import on_ranks
from distributed.test_ranks import said
from torch import Tensor, nn

from lisa_kernels import AdamW8bit, InputError
from lisa_kernels.distributed.shards import local, whole
from lisa_kernels.methods import GaLoreAdamW8bit
from lisa_kernels.optim.sharded import check_own, state_from_all

# On two ranks; rows of 384 end with a block of 256 two by two, and the last of 43 within one.
SHAPES = {"even": (16, 512), "uneven": (17, 512), "blocks over rows": (43, 384), "vector": (24,), "one row": (1, 8)}


def normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def step(params: list[Any], gradients: list[Tensor], optimizer: AdamW8bit) -> None:
    from torch.distributed.tensor import distribute_tensor

    for param, gradient in zip(params, gradients):
        sharded = hasattr(param, "device_mesh")
        param.grad = distribute_tensor(gradient, param.device_mesh, param.placements) if sharded else gradient.clone()
    optimizer.step()


def everything(rank: int) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    values = [normal(shape, seed).to(torch.bfloat16) for seed, shape in enumerate(SHAPES.values())]
    shards: list[Any] = [nn.Parameter(distribute_tensor(value, mesh, [Shard(0)])) for value in values]
    wholes = [nn.Parameter(value.clone()) for value in values]
    settings: dict[str, Any] = {"lr": 1e-2, "max_grad_norm": 1e6, "seed": 3}
    ours, theirs = AdamW8bit(shards, **settings), AdamW8bit(wholes, **settings)
    for number in range(3):
        gradients = [normal(shape, 10 * number + 7).to(torch.bfloat16) for shape in SHAPES.values()]
        step(shards, gradients, ours)
        step(wholes, gradients, theirs)
    found: dict[str, Any] = {"steps": [whole(s.detach()).equal(w.detach()) for s, w in zip(shards, wholes)]}
    found["norm"] = float(ours.last_grad_norm) / float(theirs.last_grad_norm)  # type: ignore[arg-type]
    saved, plain = ours.state_dict(), theirs.state_dict()
    # A state of shards is taken over, and so is one of whole tensors.
    for name, state in (("own", saved), ("whole", plain)):
        again = AdamW8bit(shards, **settings)
        again.load_state_dict(state)
        found[f"loaded {name}"] = all(
            local(one).equal(local(other))
            for param in shards
            for one, other in zip(again.state[param].values(), ours.state[param].values())
        )
    bad = [normal(shape, 1).to(torch.bfloat16) for shape in SHAPES.values()]
    bad[0][0, 0] = torch.inf
    step(shards, bad, ours)
    found["skipped"] = ours.skipped_steps, [whole(s.detach()).equal(w.detach()) for s, w in zip(shards, wholes)]
    other = {**saved, "format": {**saved["format"], "shards": [1 - rank, 2]}}
    found["another's"] = said(lambda: AdamW8bit(shards, **settings).load_state_dict(other))
    odd = nn.Parameter(distribute_tensor(torch.zeros(50, 100), mesh, [Shard(0)]))
    found["cut"] = said(lambda: AdamW8bit([odd]))
    found["projected"] = said(lambda: GaLoreAdamW8bit([{"params": [shards[0]], "rank": 2}]))
    return found


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return on_ranks(everything)


def test_shards_take_the_steps_of_whole_parameters(found: list[dict[str, Any]]) -> None:
    """Bit for bit in bfloat16, with rows fewer on one rank or none, blocks over rows, and moments of 32 bits."""
    for each in found:
        assert each["steps"] == [True] * len(SHAPES)
        assert each["norm"] == pytest.approx(1.0, rel=1e-6)


def test_a_gradient_that_is_not_finite_on_one_rank_skips_the_step_on_all(found: list[dict[str, Any]]) -> None:
    for each in found:
        assert each["skipped"] == (1, [True] * len(SHAPES))


def test_states_of_shards_and_of_whole_parameters_are_taken_over(found: list[dict[str, Any]]) -> None:
    for each in found:
        assert each["loaded own"]
        assert each["loaded whole"]


def test_what_would_be_wrong_in_silence_is_refused(found: list[dict[str, Any]]) -> None:
    """Another rank's shards, rows that cut blocks, and projections of a part of a gradient."""
    for rank, each in enumerate(found):
        assert each["another's"].startswith(f"the state holds the shards of rank {1 - rank} of 2; save it with")
        assert "blocks of 256 would be cut; use a smaller block_size" in each["cut"]
        assert "is sharded, and a projection is of the whole gradient" in each["projected"]


def test_whole_parameters_refuse_shards_and_take_what_was_gathered() -> None:
    """Of scales by groups of rows what is behind the last block is left out."""
    with pytest.raises(InputError, match="shards of rank 0 of 2"):
        check_own({"shards": [0, 2]}, [torch.zeros(2)])
    taken = state_from_all(torch.zeros(3, 128), {"m_absmax": torch.tensor([[1.0], [2.0]])}, 256)
    assert taken["m_absmax"].tolist() == [1.0, 2.0]
    taken = state_from_all(torch.zeros(2, 128), {"m_absmax": torch.tensor([[1.0], [0.0]])}, 256)
    assert taken["m_absmax"].tolist() == [1.0]
