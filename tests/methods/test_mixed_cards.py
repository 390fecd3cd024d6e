"""On cards of several kinds all ranks take rank 0's bases: what each would find differs in its last bits."""

from __future__ import annotations

import pytest
import torch
from distributed.ranks import on_ranks
from distributed.runs import train
from torch import Tensor

from lisa_kernels import GaLore, InputError, OwLore
from lisa_kernels.basis import range_finder
from lisa_kernels.methods import Method, agreement
from lisa_kernels.methods.agreement import kind_of

METHODS: dict[str, Method] = {
    "OwLore": OwLore(active_layers=1, period=3, rank=8, gap=2),
    "GaLore": GaLore(rank=8, gap=3, embeddings="low-rank"),
}


def multiply_otherwise(patch: pytest.MonkeyPatch) -> None:
    """Have what is made of sums, which are the same, differ in the last bits, as another card's products do."""
    for name in ("leading_rows", "nearest_turn", "whitened_rows"):
        real = getattr(range_finder, name)

        def other(*args: Tensor | int, real: object = real) -> Tensor:
            found: Tensor = real(*args)  # type: ignore[operator]
            return found * (1 + 2**-22)

        patch.setattr(range_finder, name, other)


def ended(method: Method, rank: int) -> list[int] | str:
    """Return the digests of all that a run has in the end, or what it stopped with."""
    try:
        return train(method, False, rank, steps=7).digests()
    except InputError as error:
        return str(error)


def digests(rank: int) -> dict[str, list[int] | str]:
    found = {}
    for name, method in METHODS.items():
        for told in (True, False):
            with pytest.MonkeyPatch.context() as patch:
                if rank:
                    multiply_otherwise(patch)
                if told:
                    patch.setattr(agreement, "kind_of", lambda device: f"card {rank}")
                found[f"{name} {told}"] = ended(method, rank)
    return found


@pytest.fixture(scope="module")
def found() -> list[dict[str, list[int] | str]]:
    return on_ranks(digests)


@pytest.mark.parametrize("name", METHODS)
def test_cards_that_multiply_otherwise_train_the_same(name: str, found: list[dict[str, list[int] | str]]) -> None:
    """Weights, states and bases are equal bit for bit over switches and refreshes."""
    assert isinstance(found[0][f"{name} True"], list)
    assert found[0][f"{name} True"] == found[1][f"{name} True"]


def test_where_nobody_knows_they_part(found: list[dict[str, list[int] | str]]) -> None:
    """The control: ranks that take each other for of one kind find bases of their own, and a switch says so."""
    assert found[0]["GaLore False"] != found[1]["GaLore False"]
    for each in found:
        assert str(each["OwLore False"]).startswith("after step 3, ")


def test_a_device_has_the_name_of_its_kind() -> None:
    """Of a CPU what instructions it multiplies with."""
    assert torch.backends.cpu.get_cpu_capability() in kind_of(torch.device("cpu"))
    assert kind_of(torch.device("meta")) == "meta"
