"""States in pages: what a step does is the same bit for bit, and two pages at most are on the device."""

from __future__ import annotations

import copy
import math
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lisa_kernels.errors import InputError
from lisa_kernels.optim import AdamW8bit, paged, to_torch
from lisa_kernels.paging import Page, Store
from lisa_kernels.paging.host import HostPage, HostStore

from .steps import LR, assert_same, normal, parameters, run, saved_and_loaded, set_gradients, tensors_of

STORES = ["resident", "host", "file"]
SHAPES = [(64, 80), (5, 7), (300,), (70, 70), (80, 64), (9,), (65, 65)]


@pytest.fixture(autouse=True)
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of 16 KiB, so that a handful of parameters fill several."""
    monkeypatch.setattr(paged, "PAGE_BYTES", 1 << 14)


@pytest.fixture(params=STORES)
def paging(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"file:{tmp_path / 'pages'}" if request.param == "file" else request.param


def many(dtype: torch.dtype = torch.bfloat16) -> list[nn.Parameter]:
    return [nn.Parameter(normal(*shape, seed=number, dtype=dtype)) for number, shape in enumerate(SHAPES)]


def grouped(params: list[nn.Parameter], paging: str | None, **settings: Any) -> AdamW8bit:
    groups = [{"params": params[:3]}, {"params": params[3:5], "lr": 3 * LR}, {"params": params[5:], "weight_decay": 0}]
    return AdamW8bit(groups, lr=LR, seed=11, paging=paging, **settings)


def pages_of(optimizer: AdamW8bit) -> list[Page]:
    assert optimizer._paged is not None
    return [held.page for held in dict.fromkeys(optimizer._paged._pages.values())]


def eventful(optimizer: AdamW8bit, params: list[nn.Parameter], steps: range) -> None:
    """Train with gradients that come and go, steps that are skipped, and a rate that changes."""
    for step in steps:
        set_gradients(params, step, scale=math.nan if step == 3 else 1.0)
        for number, param in enumerate(params):
            if (number + step) % 4 == 0:
                param.grad = None
        optimizer.param_groups[0]["lr"] = LR / (1 + step)
        optimizer.step()


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
@pytest.mark.parametrize("max_grad_norm", [None, 0.5], ids=["unclipped", "clipped"])
def test_paged_is_resident_bit_for_bit(paging: str, rounding: str, max_grad_norm: float | None) -> None:
    """Over groups, pages, skipped steps and parameters that first move when the pages of others are made."""
    one, other = many(), many()
    resident = grouped(one, None, rounding=rounding, max_grad_norm=max_grad_norm)
    moved = grouped(other, paging, rounding=rounding, max_grad_norm=max_grad_norm)
    eventful(resident, one, range(8))
    eventful(moved, other, range(8))
    assert_same(moved, resident)
    assert [set(moved.state[p]) for p in other] == [set(resident.state[p]) for p in one]
    assert (paging == "resident") == (moved._paged is None)
    assert moved._paged is None or len(pages_of(moved)) > 3


def test_the_gradients_norm_is_summed_in_the_order_of_a_resident_step() -> None:
    """In another order it would differ in its last bits, and with it every clipped step."""
    one, other = many(torch.float32), many(torch.float32)
    resident, moved = grouped(one, None, max_grad_norm=0.1), grouped(other, "host", max_grad_norm=0.1)
    for step in range(10):
        set_gradients(one, step)
        set_gradients(other, step)
        resident.step()
        moved.step()
        assert torch.equal(resident.last_grad_norm, moved.last_grad_norm)  # type: ignore[arg-type]


def test_a_gradscalers_verdict_skips_all_pages() -> None:
    params = many(torch.float32)
    optimizer = grouped(params, "host")
    run(optimizer, params, range(2))
    before = [tensor.clone() for tensor in tensors_of(optimizer)]
    set_gradients(params, 2)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert all(torch.equal(tensor, old) for tensor, old in zip(tensors_of(optimizer), before))
    assert optimizer.skipped_steps == 1


class Watched(HostPage):
    """A page that counts how many there are on the device."""

    there: set[int]

    def prefetch(self) -> None:
        super().prefetch()
        if self.on_device:
            self.there.add(id(self))

    def take(self) -> Tensor:
        self.there.add(id(self))
        return super().take()

    def give_back(self) -> None:
        super().give_back()
        self.there.discard(id(self))


def test_two_pages_are_on_the_device_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one in use and the next one; between steps there is none."""
    monkeypatch.setattr("lisa_kernels.paging.host.HostPage", Watched)
    Watched.there = set()
    params = many()
    optimizer = grouped(params, "host")
    most = []
    update = optimizer._update

    def watch(*arguments: Any) -> None:
        most.append(len(Watched.there))
        update(*arguments)

    monkeypatch.setattr(optimizer, "_update", watch)
    run(optimizer, params, range(3))
    assert max(most) == 2
    assert not Watched.there
    sizes = [page.nbytes for page in pages_of(optimizer)]
    assert len(sizes) > 2
    assert max(sizes) <= paged.PAGE_BYTES


def test_a_step_holds_three_pages_or_a_larger_one_and_the_next() -> None:
    """In the bytes of storages that are alive, whoever holds them; nothing is left after a step."""
    params = [nn.Parameter(normal(64, 80)) for _ in range(9)]
    for place in (0, 6):
        params.insert(place, nn.Parameter(normal(150, 100)))
    optimizer = AdamW8bit(params, paging="host")
    alive: dict[int, int] = {}
    most = 0

    def watch(slab: Tensor) -> None:
        nonlocal most
        storage = slab.untyped_storage()
        alive[storage._cdata] = slab.numel()
        weakref.finalize(storage, alive.pop, storage._cdata)
        most = max(most, sum(alive.values()))

    assert isinstance(optimizer.store, HostStore)
    optimizer.store.watchers.append(watch)
    run(optimizer, params, range(3))
    sizes = [page.nbytes for page in pages_of(optimizer)]
    regular, larger = max(size for size in sizes if size <= paged.PAGE_BYTES), max(sizes)
    assert larger > paged.PAGE_BYTES
    assert most == max(3 * regular, regular + larger)
    assert not alive


def test_a_state_larger_than_a_page_has_one_to_itself() -> None:
    param = nn.Parameter(normal(200, 200))
    optimizer = AdamW8bit([param, *many(torch.float32)], paging="host")
    run(optimizer, optimizer.param_groups[0]["params"], range(1))
    assert max(page.nbytes for page in pages_of(optimizer)) > 2 * 200 * 200


@pytest.mark.parametrize("source", [None, "host", "file"])
def test_a_checkpoint_of_one_store_loads_under_every_other(source: str | None, paging: str, tmp_path: Path) -> None:
    params = many()
    place = f"file:{tmp_path / 'source'}" if source == "file" else source
    optimizer = grouped(params, place)
    eventful(optimizer, params, range(5))
    state = saved_and_loaded(optimizer.state_dict())
    resumed_params = [nn.Parameter(param.detach().clone()) for param in params]
    resumed = grouped(resumed_params, paging)
    run(resumed, resumed_params, range(1))
    for old, new in zip(params, resumed_params):
        new.data.copy_(old)
    resumed.load_state_dict(state)
    assert_same(resumed, optimizer)
    eventful(optimizer, params, range(5, 9))
    eventful(resumed, resumed_params, range(5, 9))
    assert_same(resumed, optimizer)


def test_a_loaded_state_is_a_copy() -> None:
    params, other_params = many(), many()
    optimizer, other = grouped(params, None), grouped(other_params, "host")
    run(optimizer, params, range(1))
    other.load_state_dict(optimizer.state_dict())
    before = [tensor.clone() for tensor in tensors_of(optimizer)]
    run(other, other_params, range(1, 3))
    assert all(torch.equal(tensor, old) for tensor, old in zip(tensors_of(optimizer), before))


Duplicate = Callable[[Any], Any]
DUPLICATES = pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))], ids=["copy", "pickle"]
)


@DUPLICATES
def test_a_copy_is_whole_and_its_own(duplicate: Duplicate) -> None:
    params = many()
    optimizer = grouped(params, "host")
    run(optimizer, params, range(2))
    twin = duplicate(optimizer)
    twin_params = [param for group in twin.param_groups for param in group["params"]]
    assert_same(twin, optimizer)
    run(optimizer, params, range(2, 4))
    run(twin, twin_params, range(2, 4))
    assert_same(twin, optimizer)
    assert twin.paging == "host"
    assert len(pages_of(twin)) == len(pages_of(optimizer))


@DUPLICATES
def test_a_copy_does_not_write_into_the_folder_of_its_original(duplicate: Duplicate, tmp_path: Path) -> None:
    """It can be read, and trains once the original is gone."""
    params = many()
    optimizer = grouped(params, f"file:{tmp_path}")
    run(optimizer, params, range(2))
    twin = duplicate(optimizer)
    twin_params = [param for group in twin.param_groups for param in group["params"]]
    assert_same(twin, optimizer)
    set_gradients(twin_params, 2)
    with pytest.raises(InputError, match="in use by another"):
        twin.step()


def test_moments_are_read_and_written_where_they_are() -> None:
    one, other = many(), many()
    resident, moved = grouped(one, None), grouped(other, "host")
    for optimizer, params in ((resident, one), (moved, other)):
        run(optimizer, params, range(2))
        for param in (params[0], params[2]):
            m, v = optimizer.moments(param)
            optimizer.set_moments(param, 2 * m, 3 * v)
    assert_same(moved, resident)
    for param, twin in zip(other, one):
        assert all(torch.equal(a, b) for a, b in zip(moved.moments(param), resident.moments(twin)))


def test_a_paged_state_is_handed_over_to_torch_as_a_resident_one() -> None:
    one, other = many(torch.float32), many(torch.float32)
    resident, moved = grouped(one, None), grouped(other, "host")
    run(resident, one, range(2))
    run(moved, other, range(2))
    wanted, found = to_torch(resident)["state"], to_torch(moved)["state"]
    assert wanted.keys() == found.keys()
    assert all(torch.equal(found[number][name], wanted[number][name]) for number in wanted for name in wanted[number])


def test_pages_go_with_the_last_of_their_parameters(paging: str) -> None:
    """One that returns begins anew, in a page of its own while its old neighbours keep theirs."""
    if paging == "resident":
        pytest.skip("nothing is paged")
    one, other = many(), many()
    resident, moved = grouped(one, None), grouped(other, paging)
    for optimizer, params in ((resident, one), (moved, other)):
        run(optimizer, params, range(2))
        optimizer.retire([params[0]])
        run(optimizer, params, range(2, 4))
    assert_same(moved, resident)
    moved.retire(other)
    assert not pages_of(moved)
    assert moved._paged is not None
    store: Store = moved._paged.open()
    held = store.nbytes
    run(moved, other, range(4, 5))
    assert store.nbytes <= max(held, sum(page.nbytes for page in pages_of(moved)))


def test_a_write_that_fails_stops_the_step_and_loses_no_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages that were written are whole, and the state that could not be written is still there to be saved."""
    params = many()
    optimizer = grouped(params, f"file:{tmp_path / 'pages'}")
    run(optimizer, params, range(2))
    homes = [(page, page.home().clone()) for page in pages_of(optimizer)]
    set_gradients(params, 2)
    with monkeypatch.context() as patch:
        patch.setattr("lisa_kernels.paging.file.write_page_file", full_disk)
        with pytest.raises(InputError, match="No space left on device"):
            optimizer.step()
    assert all(torch.equal(page.home(), before) for page, before in homes)
    counts = {int(state["step"]) for state in optimizer.state_dict()["state"].values()}
    assert counts == {2, 3}


def full_disk(*_: Any) -> int:
    raise OSError(28, "No space left on device")


def test_a_store_that_cannot_work_is_refused_before_training(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("")
    for paging, words in [("hots", "did you mean 'host'"), (f"file:{plain}/pages", "cannot hold pages")]:
        with pytest.raises(InputError, match=words):
            AdamW8bit(parameters(), paging=paging)


def test_without_paging_there_are_no_pages() -> None:
    params = parameters()
    optimizer = AdamW8bit(params)
    run(optimizer, params, range(1))
    assert optimizer._paged is None
