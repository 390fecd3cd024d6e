"""Paged state and layers that rest in pages: the run is the same bit for bit, and nothing grows."""

from __future__ import annotations

import copy
import dataclasses
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from families import llama, snapshot, tokens, train
from torch import nn

from lisa_kernels import LISA, OWS, BAdam, FullFineTune, GaLore, InputError, LoRAFA, OwLore, attach
from lisa_kernels.methods import Method, SampledAdamW
from lisa_kernels.optim import paged as paged_states

from .test_resume import assert_same, through_disk

SWITCHING: dict[str, Any] = {
    "lisa": LISA(active_layers=2, period=1),
    "lisa-sampled": LISA(active_layers=2, period=1, embeddings="sampled"),
    "ows-gradient-norm": OWS(active_layers=1, period=1, scores="gradient-norm"),
    "owlore": OwLore(active_layers=2, period=2, gap=3, rank=4, scores="uniform", embeddings="low-rank"),
    "owlore-remainder": OwLore(active_layers=2, period=1, gap=2, rank=4, scores="uniform", master="remainder"),
    "badam": BAdam(period=2, order="ascending"),
}
STANDING: dict[str, Any] = {
    "galore": GaLore(rank=4, gap=3, master="remainder"),
    "lora-fa": LoRAFA(rank=4),
    "full": FullFineTune(),
}


@pytest.fixture(autouse=True)
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of 32 KiB: a block's state fills several."""
    monkeypatch.setattr(paged_states, "PAGE_BYTES", 1 << 15)


def place(store: str | None, folder: Path) -> str | None:
    return f"file:{folder / 'pages'}" if store == "file" else store


def start(method: Method, paging: str | None, seed: int = 5) -> tuple[Any, SampledAdamW]:
    model = llama(layers=3, hidden_size=64, intermediate_size=96).bfloat16()
    return model, attach(model, method, lr=3e-3, seed=seed, paging=paging, max_grad_norm=0.5)


def run(model: Any, optimizer: SampledAdamW, steps: range) -> None:
    for step in steps:
        train(model, optimizer, tokens(1, 6, seed=step))


def assert_same_run(one: tuple[Any, SampledAdamW], other: tuple[Any, SampledAdamW]) -> None:
    """Weights, states, bases, remainders, draws."""
    assert_same(snapshot(one[0]), snapshot(other[0]))
    states = [optimizer.state_dict() for _, optimizer in (one, other)]
    for state in states:
        state["attachment"]["method"].pop("retired_state", None)
    assert_same(*states)


def came_back(history: list[list[int]], layer: int) -> bool:
    """Return whether a layer was active, rested, and was active again."""
    turns = "".join("#" if layer in active else "." for active in history)
    return "." in turns.strip(".")


@pytest.mark.parametrize("store", [None, "host", "file"])
@pytest.mark.parametrize("name", SWITCHING)
def test_layers_that_rest_in_pages_come_back_as_if_they_had_been_kept(
    name: str, store: str | None, tmp_path: Path
) -> None:
    """`retired_state="page"` against "keep" without paging, over switches."""
    kept = start(dataclasses.replace(SWITCHING[name], retired_state="keep"), None)
    paged = start(dataclasses.replace(SWITCHING[name], retired_state="page"), place(store, tmp_path))
    run(*kept, range(9))
    run(*paged, range(9))
    assert paged[1].history == kept[1].history
    assert any(came_back(kept[1].history, layer) for layer in range(len(kept[1].layout.drawn)))
    assert_same_run(paged, kept)


@pytest.mark.parametrize("store", ["host", "file"])
@pytest.mark.parametrize("name", [*SWITCHING, *STANDING])
def test_a_paged_run_is_the_resident_one(name: str, store: str, tmp_path: Path) -> None:
    """With layers that drop their state, and with methods that switch nothing."""
    method = {**SWITCHING, **STANDING}[name]
    resident, paged = start(method, None), start(method, place(store, tmp_path))
    run(*resident, range(7))
    run(*paged, range(7))
    assert_same_run(paged, resident)
    paged[1].detach()
    resident[1].detach()
    assert_same(dict(paged[0].state_dict()), dict(resident[0].state_dict()))
    assert not (tmp_path / "pages").exists()


def test_dropped_state_makes_another_run() -> None:
    """Negative control: layers that begin anew do not end where those end that go on."""
    kept = start(BAdam(period=1, retired_state="page", order="ascending"), None)
    dropped = start(BAdam(period=1, order="ascending"), None)
    run(*kept, range(7))
    run(*dropped, range(7))
    with pytest.raises(AssertionError):
        assert_same_run(kept, dropped)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("host", "file"),
        ("file", None),
        *(
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in ((None, "host"), ("file", "file"), ("resident", "host"))
        ),
    ],
)
def test_a_checkpoint_under_one_store_resumes_under_another(
    source: str | None, target: str | None, tmp_path: Path
) -> None:
    """Bit-equal to the run that was not stopped, whichever layers rest where."""
    method = dataclasses.replace(SWITCHING["owlore-remainder"], retired_state="page")
    whole, first = start(method, None), start(method, place(source, tmp_path / "source"))
    run(*whole, range(9))
    run(*first, range(5))
    weights, state = through_disk(first[0].state_dict()), through_disk(first[1].state_dict())
    run(*first, range(5, 9))
    resumed = start(method, place(target, tmp_path / "target"), seed=99)
    run(*resumed, range(2))
    resumed[0].load_state_dict(weights)
    resumed[1].load_state_dict(state)
    assert_same(resumed[1].state_dict(), state)
    run(*resumed, range(5, 9))
    assert_same_run(first, whole)
    assert_same_run(resumed, whole)


def test_saving_in_the_middle_changes_nothing() -> None:
    """Pages that stay on the device go home for it, and return."""
    method = dataclasses.replace(SWITCHING["owlore"], retired_state="page")
    saved, left_alone = start(method, None), start(method, None)
    for step in range(8):
        run(*saved, range(step, step + 1))
        copy.deepcopy(saved[1].state_dict())
    run(*left_alone, range(8))
    assert_same_run(saved, left_alone)


def owned(optimizer: SampledAdamW) -> dict[str, int]:
    """Return the bytes on the device, those in the store, and the number of tensors."""
    assert optimizer._paged is not None
    store = optimizer._paged.open()
    layers = [layer for unit in optimizer.layout.units() for layer in unit.lowrank.values()]
    buffers = [tensor for layer in layers for tensor in (layer.slot, layer.basis, layer.remainder)]
    return {
        "slabs": store.device_bytes(torch.device("cpu")),  # type: ignore[attr-defined]
        "buffers": sum(tensor.untyped_storage().nbytes() for tensor in buffers),
        "store": store.nbytes,
        "states": sum(len(values) for values in optimizer.state.values()),
    }


def grow(method: Method, paging: str | None, switches: int) -> None:
    """Assert that nothing is owned after many switches that was not when every layer had been seen."""
    model = llama(layers=4).bfloat16()
    optimizer = attach(model, method, paging=paging)
    warm_up = []
    for step in range(25):
        train(model, optimizer, tokens(1, 4, step % 3))
        warm_up.append(owned(optimizer))
    assert all(optimizer.visits)
    most = {key: max(row[key] for row in warm_up) for key in warm_up[0]}
    memory = psutil.Process().memory_info().rss
    for step in range(switches):
        train(model, optimizer, tokens(1, 4, step % 3))
        now = owned(optimizer)
        assert all(value <= most[key] for key, value in now.items())
        assert now["store"] == warm_up[-1]["store"]
    assert psutil.Process().memory_info().rss - memory < 16e6


GROWING: dict[str, tuple[Method, str | None]] = {
    "owlore-page": (OwLore(active_layers=2, period=1, rank=4, scores="uniform", retired_state="page"), None),
    "owlore-page-host": (
        OwLore(active_layers=2, period=1, rank=4, scores="uniform", retired_state="page", master="remainder"),
        "host",
    ),
    "owlore-drop-host": (OwLore(active_layers=2, period=1, rank=4, scores="uniform"), "host"),
    "lisa-page": (LISA(active_layers=1, period=1, retired_state="page"), None),
    "lisa-drop-host": (LISA(active_layers=1, period=1), "host"),
}


@pytest.mark.parametrize("name", GROWING)
def test_a_few_switches_leave_bytes_as_they_were(name: str) -> None:
    grow(*GROWING[name], switches=15)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["owlore-page-host", "lisa-drop-host"])
def test_a_thousand_switches_leave_bytes_as_they_were(name: str) -> None:
    """What grows by a page a switch is seen in fifteen; what the process keeps beside tensors, in a thousand."""
    grow(*GROWING[name], switches=1000)


@pytest.mark.parametrize("store", [None, "host"])
def test_layers_that_rest_own_nothing_on_the_device(store: str | None) -> None:
    """Negative control of the pages: what is active has its bytes there."""
    method = OwLore(active_layers=1, period=2, rank=4, scores="uniform", retired_state="page", master="remainder")
    model, optimizer = start(method, store)
    assert optimizer._paged is not None
    for step in range(8):
        run(model, optimizer, range(step, step + 1))
        for index, unit in enumerate(optimizer.layout.drawn):
            active = index in optimizer.active_layers
            pages = [optimizer._paged._pages[param] for param in unit.params() if param in optimizer._paged._pages]
            assert all(page.at_hand == (active and store is None) for page in pages) or active
            for layer in unit.lowrank.values():
                for tensor in (layer.slot, layer.basis, layer.remainder):
                    assert (tensor.untyped_storage().nbytes() > 0) == active


def test_what_comes_next_is_on_its_way_before_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sampler knows the next draw: its pages are fetched during the step that ends the period."""
    model, optimizer = start(dataclasses.replace(SWITCHING["owlore"], retired_state="page"), None)
    asked: list[tuple[int, str]] = []
    prefetch = optimizer._shelf.prefetch
    monkeypatch.setattr(
        optimizer._shelf, "prefetch", lambda unit: (asked.append((optimizer.calls, unit.name)), prefetch(unit))
    )
    run(model, optimizer, range(8))
    history = optimizer.history
    wanted = [
        (2 * number - 1, optimizer.layout.drawn[index].name)
        for number, (before, after) in enumerate(pairwise(history), start=1)
        for index in after if index not in before
    ]  # fmt: skip
    assert asked == wanted
    assert asked


def full_disk(*_: Any) -> int:
    raise OSError(28, "No space left on device")


def test_a_full_disk_at_a_switch_stops_the_run_with_the_last_states_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No layer has lost its slot, basis or moments by it, and the pages of earlier switches are as they were."""
    method = dataclasses.replace(SWITCHING["owlore"], retired_state="page")
    model, optimizer = start(method, place("file", tmp_path))
    run(model, optimizer, range(3))
    # On to the last step of a period that ends in a switch.
    while optimizer.calls % 2 == 0 or list(optimizer.sampler.draw(optimizer.calls // 2 + 1)) == optimizer.active_layers:  # type: ignore[union-attr]
        run(model, optimizer, range(optimizer.calls, optimizer.calls + 1))
    pages = {path.name: path.read_bytes() for path in (tmp_path / "pages").glob("bases-*.page")}
    assert pages
    model(**tokens(1, 6)).loss.backward()
    write, written = full_disk, optimizer._shelf.put
    monkeypatch.setattr(optimizer._shelf, "put", lambda *a: (patch_writes(monkeypatch, write), written(*a)))
    active = optimizer.active_layers
    with pytest.raises(InputError, match=r"No space left on device.*resume from the last checkpoint"):
        optimizer.step()
    assert optimizer.active_layers == active
    assert all(layer.active and layer.basis.numel() for layer in optimizer._active_slots())
    assert {path.name: path.read_bytes() for path in (tmp_path / "pages").glob("bases-*.page")} == pages


def patch_writes(monkeypatch: pytest.MonkeyPatch, write: Any) -> None:
    monkeypatch.setattr("lisa_kernels.paging.file.write_page_file", write)


def test_pages_of_another_run_are_refused_and_the_model_is_as_it_was(tmp_path: Path) -> None:
    """Another seed or another method is another run."""
    paging = place("file", tmp_path)
    _, optimizer = start(SWITCHING["lisa"], paging)
    run(optimizer.model, optimizer, range(1))
    assert optimizer._paged is not None
    optimizer._paged.open()._lock.close()  # type: ignore[attr-defined]
    for method, seed in [(SWITCHING["lisa"], 6), (SWITCHING["badam"], 5)]:
        model = llama(layers=3, hidden_size=64, intermediate_size=96).bfloat16()
        before = {name: type(module) for name, module in model.named_modules()}
        with pytest.raises(InputError, match="of another run"):
            attach(model, method, lr=3e-3, seed=seed, paging=paging)
        assert {name: type(module) for name, module in model.named_modules()} == before
        assert all(isinstance(param, nn.Parameter) and param.requires_grad for param in model.parameters())
    # The same run may begin again: what it left makes room.
    run(*start(SWITCHING["lisa"], paging), range(1))
