"""Switches of layers at rest: masters go and come beside other work in every order; the host waits once a switch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from families import llama
from torch import Tensor

from device.simulated import Note, Order, noted_faults, set_order, waits
from device.test_paging import NamedLanes, NamedQueue
from device.training import batch
from lisa_kernels import LISA, OwLore, attach
from lisa_kernels.methods import Method
from lisa_kernels.ops import resting as ops
from lisa_kernels.paging.master_copies import MasterCopies

CASES: dict[str, tuple[Method, dict[str, Any]]] = {
    "lisa": (LISA(1, 2, embeddings="frozen"), {}),
    "owlore": (OwLore(1, 2, rank=8, scores="uniform", embeddings="frozen"), {}),
    "owlore-on-masters": (OwLore(1, 2, rank=8, scores="uniform", embeddings="frozen"), {"active_on": "master"}),
}
STEPS = 5
# Who must wait, and for whom.
ORDERINGS = {
    "copies-in-wait-for-work": ("in", "work"), "work-waits-for-copies-in": ("work", "in"),
    "copies-out-wait-for-work": ("out", "work"), "copies-in-wait-for-those-out": ("in", "out"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several of each matrix."""
    monkeypatch.setattr(ops, "TILE_ELEMENTS", 1 << 9)


def trained(name: str, **sizes: int) -> tuple[list[Tensor], list[list[Note]]]:
    """Return losses and masters of a run, and what the host waited for in each step."""
    method, settings = CASES[name]
    model: Any = llama(layers=4, **sizes).to(torch.bfloat16)
    opt = attach(model, method, lr=1e-2, seed=0, resting="int8", **settings)
    model.to("cuda")
    seen: list[Tensor] = []
    waited = []
    for step in range(STEPS):
        loss = model(**batch("cuda", step)).loss
        loss.backward()
        with waits() as noted:
            opt.step()
        waited.append(noted)
        opt.zero_grad()
        seen.append(loss.detach())
    # In the middle of a period; what is saved is what is there after the end.
    seen += [value.cpu() for value in model.state_dict().values()]
    seen += opt.detach().state_dict().values()
    assert len(set(map(tuple, opt.history))) > 1
    return [value.cpu() for value in seen], waited


@pytest.mark.parametrize("name", CASES)
def test_masters_are_the_same_in_every_order(name: str, order: Order) -> None:
    """And the host waits for them once where layers change, however many tiles there are; else for new bases only."""
    set_order(Order.EAGER)
    wanted, _ = trained(name)
    set_order(order, seed=1)
    found, waited = trained(name)
    assert all(map(torch.equal, wanted, found))
    places = [[note.places[0] for note in noted if "tracker" not in note.places[0]] for noted in waited]
    assert [len(each) for each in places] == [0, 1, 0, 1, 0]
    assert all("master_copies" in place for each in places for place in each)


class CountedQueue(NamedQueue):
    """A stream that notes its copies."""

    copied: ClassVar[list[tuple[str, int]]] = []

    def copy_(self, target: Tensor, source: Tensor) -> None:
        self.copied.append((self._name, source.nbytes))
        super().copy_(target, source)


class CountedLanes(NamedLanes):
    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.inwards = CountedQueue(torch.cuda.Stream(device), "in", None)
        self.outwards = CountedQueue(torch.cuda.Stream(device), "out", None)


@pytest.mark.order("eager")
@pytest.mark.parametrize("name", CASES)
def test_a_switch_copies_each_master_once_there_and_once_back(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the layer that leaves and of the one that comes; where slots accumulate, of the one that leaves."""
    monkeypatch.setattr(MasterCopies.__init__, "__defaults__", (CountedLanes,))
    CountedQueue.copied.clear()
    trained(name)
    block = llama().model.layers[0]
    layers = [module for module in block.modules() if isinstance(module, torch.nn.Linear)]
    masters = sum(2 * layer.weight.numel() for layer in layers)
    sizes = [(way, sum(size for name, size in CountedQueue.copied if name == way)) for way in ("in", "out")]
    # Two switches, and one layer home at the end; on masters that one came to the device when the model was moved.
    assert sizes == [("in", (3 if name == "owlore" else 2) * masters), ("out", 3 * masters)]
    if name != "owlore":
        assert len(CountedQueue.copied) == (2 + 3) * len(layers)


def is_right(name: str, wanted: list[Tensor]) -> bool:
    with noted_faults() as noted:
        found, _ = trained(name, intermediate_size=256)
    return all(map(torch.equal, wanted, found)) and not noted


def runs(wanted: dict[str, list[Tensor]]) -> Iterator[bool]:
    for seed in range(3):
        for order in (Order.LATE, Order.RANDOM):
            for name, values in wanted.items():
                set_order(order, seed)
                yield is_right(name, values)


@pytest.mark.order("late")
@pytest.mark.parametrize("ordering", ORDERINGS)
def test_every_ordering_is_needed(ordering: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: with one of the waits left out, some of the same runs are wrong."""
    set_order(Order.EAGER)
    wanted = {name: trained(name, intermediate_size=256)[0] for name in ("lisa", "owlore")}
    monkeypatch.setattr(MasterCopies.__init__, "__defaults__", (NamedLanes,))
    set_order(Order.LATE)
    assert is_right("lisa", wanted["lisa"])
    lanes = partial(NamedLanes, forgotten=ORDERINGS[ordering])
    monkeypatch.setattr(MasterCopies.__init__, "__defaults__", (lanes,))
    assert not all(runs(wanted))
