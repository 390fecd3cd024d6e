"""What rests on the shelf comes back as it was, a unit at a time, and takes no more room each time."""

from __future__ import annotations

import torch
from torch import Tensor

from lisa_kernels.methods.shelf import Shelf
from lisa_kernels.methods.units import Unit
from lisa_kernels.paging.host import HostStore


def tensors(seed: int, rank: int = 4) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"layers.0.{name}": {
            "basis": torch.randn(rank, 30, generator=generator).bfloat16(),
            "remainder": torch.randint(-9, 9, (5, 30), generator=generator, dtype=torch.int16),
        }
        for name in ("q_proj", "mlp.down_proj")
    }


def assert_same(found: dict[str, dict[str, Tensor]], wanted: dict[str, dict[str, Tensor]]) -> None:
    assert {path: set(each) for path, each in found.items()} == {path: set(each) for path, each in wanted.items()}
    for path, each in wanted.items():
        for name, tensor in each.items():
            assert torch.equal(found[path][name], tensor)
            assert found[path][name].dtype == tensor.dtype


def test_units_come_back_as_they_were_put_and_are_gone_then() -> None:
    store, one, other = HostStore(), Unit("one"), Unit("other")
    shelf = Shelf(lambda: store)
    shelf.put(one, tensors(1))
    shelf.put(other, {"rest": {"basis": torch.ones(2, 2)}})
    assert_same(shelf.held(), {**tensors(1), "rest": {"basis": torch.ones(2, 2)}})
    shelf.prefetch(one)
    assert_same(shelf.take(one), tensors(1))
    assert shelf.take(one) == {}
    assert_same(shelf.held(), {"rest": {"basis": torch.ones(2, 2)}})


def test_a_unit_put_again_has_the_new_tensors_in_the_place_of_the_old() -> None:
    store, unit = HostStore(), Unit("unit")
    shelf = Shelf(lambda: store)
    held = []
    for turn in range(10):
        shelf.put(unit, tensors(turn))
        assert_same(shelf.held(), tensors(turn))
        held.append(store.nbytes)
    assert len(set(held)) == 1
    shelf.put(unit, tensors(3, rank=2))
    assert_same(shelf.take(unit), tensors(3, rank=2))


def test_a_unit_without_tensors_takes_no_page() -> None:
    store = HostStore()
    shelf = Shelf(lambda: store)
    shelf.put(Unit("norms"), {"layers.0.q_proj": {}})
    assert store.nbytes == 0
    assert shelf.held() == {}
