"""Weights that are streamed from the host or a file: bits of those on the device in every order, and no step waits."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from families import llama
from torch import Tensor

from device.simulated import Order, allocations, driver, noted_faults, set_order, waits
from device.test_paging import NamedLanes
from device.training import batch
from lisa_kernels import GaLore, OwLore, attach
from lisa_kernels.layers import checkpoint_blocks
from lisa_kernels.methods import Method
from lisa_kernels.paging import Entry, SlabLayout
from lisa_kernels.paging.page_file import PageFile
from lisa_kernels.paging.streamed import StreamedPages

LAYERS = 4
METHODS: dict[str, Method] = {
    "owlore": OwLore(1, 2, rank=4, gap=2, scores="uniform", embeddings="frozen"),
    "galore": GaLore(rank=4, gap=2, embeddings="low-rank"),
}
STEPS = 3
# Numbers of the host, each a few bytes.
SMALL = 1 << 10
PAGES, PAGE_BYTES = 5, 1 << 12
# Who must wait, and for whom.
ORDERINGS = {"copies-wait-for-work": ("in", "work"), "work-waits-for-copies": ("work", "in")}


def trained(name: str, where: str, recomputed: bool, device: str) -> list[Tensor]:
    """Return losses and gradients of some steps, what a model writes after them, and its masters."""
    model: Any = llama(LAYERS).to(torch.bfloat16)
    if recomputed:
        checkpoint_blocks(model)
    # As `finetune` does it: the model comes to the device when it is small.
    opt = attach(model, METHODS[name], lr=1e-2, max_grad_norm=1.0, seed=0, resting="nf4", resting_where=where)
    model.to(device)
    seen = []
    for step in range(STEPS):
        loss = model(**batch(device, step)).loss
        loss.backward()
        seen += [loss.detach(), *(param.grad.clone() for param in model.parameters() if param.grad is not None)]
        opt.step()
        opt.zero_grad()
    ids = batch(device, 9)["input_ids"][:, :5]
    mask = torch.ones_like(ids)
    seen.append(model.eval().generate(ids, attention_mask=mask, max_new_tokens=2, do_sample=False))
    return [value.to("cpu", copy=True) for value in [*seen, *opt.detach().state_dict().values()]]


@pytest.mark.parametrize(("name", "recomputed", "device"), [("owlore", True, "cuda:1"), ("galore", False, "cuda:0")])
def test_streamed_bits_are_resident_ones(name: str, recomputed: bool, device: str, tmp_path: Path) -> None:
    """Losses, gradients, words, masters; with cuda:0 current. No memory stays locked after the end."""
    wanted, locked = trained(name, "device", recomputed, device), driver.sim_locked_bytes()
    for where in ("host", str(tmp_path)):
        found = trained(name, where, recomputed, device)
        for place, (one, other) in enumerate(zip(wanted, found, strict=True)):
            assert torch.equal(one, other), (where, place)
        torch.cuda.synchronize(device)
        gc.collect()
        assert driver.sim_locked_bytes() <= locked + SMALL


def steady_waits(where: str, order: Order, copied: list[int]) -> list[tuple[str, str]]:
    """Return what the host waits for in the last of some steps within a period, and from where; memory is asked for."""
    model: Any = llama(LAYERS).to("cuda", torch.bfloat16)
    checkpoint_blocks(model)
    method = OwLore(1, 50, rank=4, gap=50, scores="uniform", embeddings="frozen")
    opt = attach(model, method, lr=1e-2, max_grad_norm=1.0, seed=0, resting="nf4", resting_where=where)
    # Of whose blocks all are there forwards, and none anew backwards.
    assert opt.active_layers == [2]
    if opt.layout.streamed is not None:
        opt.layout.streamed.watchers.append(copied.append)
    for number in range(5):
        inputs = batch("cuda", number)
        asked = allocations()
        copied.clear()
        with waits() as noted:
            model(**inputs).loss.backward()
            opt.step()
        opt.zero_grad()
    assert allocations() == asked or order is Order.LATE
    if opt.layout.streamed is not None:
        page = opt.layout.streamed.nbytes // LAYERS
        assert copied == [page] * LAYERS
        # What the host holds: all, or what a file's pages come through.
        held = sum(buffer.numel() for buffer in opt.layout.streamed.homes())
        assert held == (LAYERS if where == "host" else 2) * page
    return [(note.what, note.places[0]) for note in noted]


@pytest.mark.order("eager", "late")
def test_a_steady_step_waits_for_nothing_more(order: Order, tmp_path: Path) -> None:
    """Than one whose weights are there: their lookups wait for ids. It asks for no memory; its copies are counted.

    Of those in a file the thread that reads waits until what it reads over is copied, and the step for the disk alone.
    """
    copied: list[int] = []
    wanted = steady_waits("device", order, copied)
    assert not copied
    assert steady_waits("host", order, copied) == wanted
    from_file = steady_waits(str(tmp_path), order, copied)
    own = [wait for wait in from_file if "page_file" not in wait[1]]
    assert own == wanted
    assert len(from_file) - len(own) <= LAYERS


def is_right(forgotten: tuple[str, str] | None, seed: int, file: PageFile | None = None) -> bool:
    """Read and write pages on the device in any order; whether all that was read is what was last written."""
    choices, seen = Random(seed), list[tuple[Tensor, int]]()
    pages = StreamedPages(lambda device: NamedLanes(device, forgotten), file)
    layout, device = SlabLayout([Entry("codes", (PAGE_BYTES,), torch.uint8)]), torch.device("cuda", 0)
    held = [pages.page(layout, device) for _ in range(PAGES)]
    values = [0] * PAGES
    for page in held:
        page.write("codes", 0, torch.zeros(PAGE_BYTES, dtype=torch.uint8, device=device))
    with noted_faults() as noted:
        for turn in range(30):
            number = turn % PAGES if turn < PAGES or choices.random() < 0.8 else choices.randrange(PAGES)
            if turn < PAGES or choices.random() < 0.2:
                values[number] = turn + 1
                held[number].write("codes", 0, torch.full((PAGE_BYTES,), turn + 1, dtype=torch.uint8, device=device))
            with held[number].lent(device) as parts:
                seen.append((parts["codes"].clone(), values[number]))
        pages.close()
        right = all(bool((codes == value).all()) for codes, value in seen)
    return right and not noted


def runs(forgotten: tuple[str, str] | None, folder: Path | None = None) -> Iterator[bool]:
    for seed in range(8):
        for order in (Order.LATE, Order.RANDOM):
            set_order(order, seed)
            yield is_right(forgotten, seed, None if folder is None else PageFile(str(folder)))


@pytest.mark.order("late")
@pytest.mark.parametrize("where", ["host", "file"])
def test_what_is_read_is_what_was_written_in_every_order(where: str, tmp_path: Path) -> None:
    assert all(runs(None, tmp_path if where == "file" else None))


@pytest.mark.order("late")
@pytest.mark.parametrize("where", ["host", "file"])
@pytest.mark.parametrize("name", ORDERINGS)
def test_every_ordering_is_needed(name: str, where: str, tmp_path: Path) -> None:
    """Negative control: with one of the waits left out, some of the same runs are wrong."""
    assert not all(runs(ORDERINGS[name], tmp_path if where == "file" else None))
