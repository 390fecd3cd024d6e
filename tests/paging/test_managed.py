"""Unified memory against a stand-in driver that counts every call and fails any: nothing leaks, every error is told."""

from __future__ import annotations

import gc
import importlib.util
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from families import anatomy, llama, tokens, train
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lisa_kernels import LISA, AdamW8bit, BAdam, attach, native
from lisa_kernels.errors import InputError
from lisa_kernels.paging import managed
from lisa_kernels.paging.managed import DRIVER, ManagedMemory, ManagedStore

from .driver_stub import EVERY_CALL, TOLD, StubDriver, compile_source

pytestmark = pytest.mark.skipif(native.load() is None, reason=native.why_absent())

CPU = torch.device("cpu")
NBYTES = 4096
# The functions that the allocator calls, each with the number of its calls in `session`.
CALLED = {
    "cuInit": 1, "cuDeviceGet": 1, "cuDeviceGetAttribute": 2, "cuDevicePrimaryCtxRetain": 1, "cuMemAllocManaged": 2,
    "cuMemAdvise_v2": 4, "cuMemPrefetchAsync_v2": 3, "cuCtxSynchronize": 2, "cuMemFree_v2": 2, "cuCtxPushCurrent_v2": 7,
    "cuCtxPopCurrent_v2": 7, "cuDevicePrimaryCtxRelease_v2": 1,
}  # fmt: skip
# Their failure takes nothing from what was done, and comes where no error can be raised.
UNTOLD = ("cuCtxPopCurrent_v2", "cuDevicePrimaryCtxRelease_v2", "cuCtxSynchronize", "cuMemFree_v2")
WITH_V1 = ("cuMemAdvise_v2", "cuMemPrefetchAsync_v2")
NAMED = {name: name.removesuffix("_v2") for name in CALLED}


def session(driver: StubDriver) -> None:
    """Use all there is: two pages, one of them called early, taken, given back, and freed."""
    store = ManagedStore(driver.path)
    first, second = (store.page(name, NBYTES, CPU) for name in ("first", "second"))
    first.prefetch()
    first.take().fill_(7)
    first.give_back()
    assert bool((first.home() == 7).all())
    second.take()
    first.free()
    second.free()
    store.close()


def test_a_page_goes_to_the_device_and_home_in_order(driver: StubDriver) -> None:
    """Advice when it is made, one prefetch each way however often it is asked for, and its memory freed at the end."""
    store = ManagedStore(driver.path)
    page = store.page("page", NBYTES, CPU)
    page.prefetch()
    page.prefetch()
    assert page.take() is page.take()
    page.give_back()
    page.give_back()
    page.free()
    moves = [line for line in driver.log() if line.startswith("cuMem")]
    assert moves == [
        f"cuMemAllocManaged {NBYTES}", "cuMemAdvise_v2 prefers host", "cuMemAdvise_v2 accessed by device 0",
        f"cuMemPrefetchAsync_v2 {NBYTES} to device 0", f"cuMemPrefetchAsync_v2 {NBYTES} to host", "cuMemFree_v2",
    ]  # fmt: skip


def test_what_is_written_on_the_device_is_read_at_home(driver: StubDriver) -> None:
    """One memory for both; a new page is zeros, though the driver gives memory of any contents."""
    page = ManagedStore(driver.path).page("page", NBYTES, CPU)
    assert not page.home().any()
    assert page.home().device == CPU
    slab = page.take()
    slab[5] = 9
    page.give_back()
    page.settle()
    assert page.home()[5] == 9
    assert page.take().data_ptr() == page.home().data_ptr() == slab.data_ptr()


def test_an_old_driver_is_called_in_its_own_form(built_driver: Path, tmp_path: Path) -> None:
    """Before CUDA 12.2 prefetch and advice name a device where they now name a place."""
    driver = StubDriver(built_driver, tmp_path, without=WITH_V1)
    session(driver)
    assert "cuMemAdvise prefers host" in driver.log()
    assert "cuMemAdvise accessed by device 0" in driver.log()
    assert f"cuMemPrefetchAsync {NBYTES} to device 0" in driver.log()
    assert f"cuMemPrefetchAsync {NBYTES} to host" in driver.log()


def test_memory_lives_as_long_as_any_view_of_it(driver: StubDriver) -> None:
    """Views, their host twins, and what outlives the store: the last of them frees the memory, then the device."""
    store = ManagedStore(driver.path)
    page = store.page("page", NBYTES, CPU)
    view, home = page.take()[8:16].view(torch.float32), page.home()
    view.fill_(1.5)
    page.free()
    store.close()
    assert store.nbytes == 0
    del page
    assert (driver.live, driver.retained) == (1, 1)
    assert home[8:12].view(torch.float32).item() == 1.5
    del home
    assert driver.live == 1
    assert view.tolist() == [1.5, 1.5]
    del view
    assert (driver.live, driver.retained) == (0, 0)


def test_bytes_are_counted_as_the_driver_gives_them(driver: StubDriver) -> None:
    """A thousand pages come and go; an empty one takes nothing."""
    store = ManagedStore(driver.path)
    kept = store.page("kept", 100, CPU)
    for index in range(1000):
        page = store.page(f"page-{index}", NBYTES, CPU)
        assert store.nbytes == 100 + NBYTES
        page.take()
        page.free()
        assert store.nbytes == 100
    empty = store.page("empty", 0, CPU)
    assert empty.take().shape == empty.home().shape == (0,)
    empty.give_back()
    assert store.nbytes == kept.nbytes == 100
    assert driver.live == 1


def test_threads_share_a_memory(driver: StubDriver) -> None:
    """Tensors are made, written and dropped on eight threads, none of which has a context of the device."""
    memory = ManagedMemory(CPU, driver.path)

    def work(number: int) -> bool:
        tensors = [memory.empty(64 + number).fill_(number) for _ in range(5)]
        memory.to_device(tensors[0])
        memory.to_host(tensors[0])
        return all(bool((tensor == number).all()) for tensor in tensors)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(200)))
    assert memory.live_bytes == 0
    assert driver.live == 0
    assert driver.calls("cuMemAllocManaged") == driver.calls("cuMemFree_v2") == 1000
    assert not driver.is_current


def test_the_calls_of_a_session_are_those_that_are_failed_below(driver: StubDriver) -> None:
    session(driver)
    assert {name: driver.calls(name) for name in CALLED} == CALLED
    assert {line.split()[0] for line in driver.log()} == set(CALLED)
    assert (driver.live, driver.retained, driver.is_current) == (0, 0, False)


@pytest.mark.parametrize(("function", "nth"), [(name, n + 1) for name, count in CALLED.items() for n in range(count)])
def test_any_call_may_fail(driver: StubDriver, function: str, nth: int) -> None:
    """Each call of each function in turn: one error that names it, nothing left behind, and the next try works."""
    driver.fail(function, nth)
    error = None
    try:
        session(driver)
    except (InputError, RuntimeError) as raised:
        error = str(raised)
    # The last two contexts are made current to free memory.
    told = function not in UNTOLD and (function, nth) not in [("cuCtxPushCurrent_v2", 6), ("cuCtxPushCurrent_v2", 7)]
    assert (error is not None) == told
    if error is not None:
        assert NAMED[function] in error
        assert TOLD in error
        assert error.startswith('paging="managed": ')
    assert driver.live == 0
    assert driver.retained == (1 if function == "cuDevicePrimaryCtxRelease_v2" else 0)
    driver.fail(function, 0)
    session(driver)
    assert driver.live == 0


@pytest.mark.parametrize("function", ["cuInit", "cuDeviceGet", "cuDeviceGetAttribute", "cuDevicePrimaryCtxRetain"])
def test_a_driver_that_does_not_open_is_a_mistake_of_the_setting(driver: StubDriver, function: str) -> None:
    driver.fail(function)
    with pytest.raises(InputError, match=r'paging="managed": cu\w+.* told to fail; use paging="host"'):
        ManagedStore(driver.path).page("page", NBYTES, CPU)


def test_an_error_without_words_is_told_by_its_number(driver: StubDriver) -> None:
    memory = ManagedMemory(CPU, driver.path)
    driver.fail("cuMemAllocManaged")
    driver.fail("cuGetErrorString")
    with pytest.raises(InputError, match=rf"cuMemAllocManaged of {NBYTES} bytes failed with error 999; .*hold 0 b"):
        memory.empty(NBYTES)


def test_memory_that_ends_says_what_pages_hold_and_what_to_do(driver: StubDriver) -> None:
    memory = ManagedMemory(CPU, driver.path)
    held = memory.empty(NBYTES)
    driver.fail("cuMemAllocManaged")
    with pytest.raises(InputError, match=f"pages hold {NBYTES} bytes already.*RAM or swap.*file:DIR"):
        memory.empty(NBYTES)
    assert held.numel() == NBYTES


def test_memory_that_torch_does_not_take_over_is_freed(driver: StubDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = ManagedMemory(CPU, driver.path)

    def interrupted(capsule: object) -> Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(managed, "from_dlpack", interrupted)
    with pytest.raises(KeyboardInterrupt):
        memory.empty(NBYTES)
    assert (driver.live, driver.calls("cuMemFree_v2"), memory.live_bytes) == (0, 1, 0)


def test_memory_that_the_driver_will_not_free_is_kept_and_told(driver: StubDriver) -> None:
    """A tensor's end raises nothing; the next allocation tries again, says so if it must, and later succeeds."""
    memory = ManagedMemory(CPU, driver.path)
    driver.fail("cuMemFree_v2", EVERY_CALL)
    tensors = [memory.empty(NBYTES) for _ in range(3)]
    del tensors
    assert (driver.live, memory.live_bytes) == (3, 3 * NBYTES)
    for _ in range(2):
        with pytest.raises(InputError, match=f"cuMemFree of {NBYTES} bytes {TOLD}"):
            memory.empty(NBYTES)
    assert driver.live == 3
    driver.fail("cuMemFree_v2", 0)
    kept = memory.empty(100)
    assert (driver.live, memory.live_bytes) == (1, kept.numel())


def test_a_page_whose_way_is_barred_is_as_it_was(driver: StubDriver) -> None:
    """A failed prefetch neither takes the page nor gives it back; its bytes stay."""
    page = ManagedStore(driver.path).page("page", NBYTES, CPU)
    page.take().fill_(3)
    driver.fail("cuMemPrefetchAsync_v2")
    with pytest.raises(RuntimeError, match="cuMemPrefetchAsync"):
        page.give_back()
    page.give_back()
    assert driver.log().count(f"cuMemPrefetchAsync_v2 {NBYTES} to host") == 2
    driver.fail("cuMemPrefetchAsync_v2")
    with pytest.raises(RuntimeError, match="cuMemPrefetchAsync"):
        page.take()
    assert bool((page.take() == 3).all())


@pytest.mark.parametrize("function", [*CALLED, "cuGetErrorString"])
def test_a_driver_without_a_function_is_refused(built_driver: Path, tmp_path: Path, function: str) -> None:
    """One that is too old, or another library by that name."""
    without = (function, NAMED[function]) if function in WITH_V1 else (function,)
    driver = StubDriver(built_driver, tmp_path, without=without)
    wanted = NAMED[function] if function in WITH_V1 else function
    with pytest.raises(InputError, match=rf'{re.escape(driver.path)} has no {wanted}, .*use paging="host"'):
        ManagedMemory(CPU, driver.path)
    assert driver.log() == []


def test_the_numbers_and_functions_are_those_of_cudas_header() -> None:
    """The stand-in could share a mistake with the allocator: here the driver's own header is asked."""
    found = importlib.util.find_spec("triton")
    header = found and found.origin and Path(found.origin).parent / "backends" / "nvidia" / "include" / "cuda.h"
    if not header or not header.exists():
        pytest.skip("no triton, which brings CUDA's header")
    sources = Path(__file__).parents[2] / "csrc"
    compile_source(
        "header_check.cpp", "-std=c++20", "-fsyntax-only", "-isystem", str(header.parent), "-I", str(sources)
    )


@pytest.mark.parametrize(
    ("attribute", "words"),
    [(83, "no unified memory"), (89, "cannot share memory .* Windows and WSL")],
    ids=["83", "89"],
)
def test_a_device_that_cannot_share_is_refused(driver: StubDriver, attribute: int, words: str) -> None:
    driver.set_attribute(attribute, 0)
    with pytest.raises(InputError, match=f'device 0 .*{words}.*use paging="host"'):
        ManagedStore(driver.path).page("page", NBYTES, CPU)
    assert driver.retained == 0


@pytest.mark.parametrize("kind", ["absent", "not a library"])
def test_what_is_no_driver_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / DRIVER
    if kind == "not a library":
        path.write_text("text")
    with pytest.raises(InputError, match=r'CUDA.s driver cannot be loaded \(.*\); use paging="host"'):
        ManagedStore(str(path)).page("page", NBYTES, CPU)


def test_without_the_compiled_library_another_store_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "load", lambda: None)
    with pytest.raises(InputError, match=r'without a C\+\+ compiler.*or use paging="host"'):
        ManagedMemory(CPU)


def weights_and_state(paging: str | None) -> tuple[list[Tensor], dict[str, Any]]:
    """Return what three steps over two groups of parameters make of them, with a switch of what trains."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((80, 64), (7,), (64, 64))]
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 1e-2}]
    optimizer = AdamW8bit(groups, paging=paging)
    for step in range(3):
        for number, param in enumerate(params):
            param.grad = torch.randn(param.shape, generator=generator) if (number + step) % 3 else None
        optimizer.step()
    return [param.detach() for param in params], optimizer.state_dict()


def test_an_optimizers_state_in_unified_memory_is_the_same_bit_for_bit(paging_managed: StubDriver) -> None:
    wanted, found = weights_and_state(None), weights_and_state("managed")
    assert all(map(torch.equal, found[0], wanted[0]))
    for one, other in zip(tree_leaves(found[1]), tree_leaves(wanted[1])):
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other
    assert paging_managed.calls("cuMemPrefetchAsync_v2") > 4
    del found
    gc.collect()
    assert (paging_managed.live, paging_managed.retained) == (0, 0)


# In a process whose dynamic linker finds the stand-in by the name of CUDA's driver.
BY_ITS_NAME = """
import torch
from lisa_kernels import AdamW8bit
param = torch.nn.Parameter(torch.ones(64, 64))
optimizer = AdamW8bit([param], paging="managed")
param.grad = torch.ones(64, 64)
optimizer.step()
print(bool((param < 1).all()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the linker looks in other places")
def test_the_driver_is_found_by_its_name(driver: StubDriver) -> None:
    variables = {**os.environ, "LD_LIBRARY_PATH": str(Path(driver.path).parent)}
    done = subprocess.run(
        [sys.executable, "-c", BY_ITS_NAME], env=variables, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "True"), done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver here")
def test_without_a_driver_nothing_is_attached() -> None:
    """The mistake is told before training, and the model is as it was."""
    model = llama(layers=2)
    shape = anatomy(model)
    with pytest.raises(InputError, match='use paging="host"'):
        attach(model, LISA(active_layers=1), paging="managed")
    assert anatomy(model) == shape


def test_layers_that_left_rest_in_unified_memory(paging_managed: StubDriver) -> None:
    """They come back as if they had been kept, over switches; detaching frees all."""
    runs = []
    for retired_state, paging in (("keep", None), ("page", "managed")):
        model = llama(layers=3)
        optimizer = attach(model, BAdam(period=2, retired_state=retired_state), lr=1e-2, paging=paging)
        for seed in range(9):
            train(model, optimizer, tokens(seed=seed))
        runs.append({name: value.clone() for name, value in model.state_dict().items()})
        optimizer.detach()
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())
    assert paging_managed.calls("cuMemAllocManaged") > 0
    del optimizer, model
    gc.collect()
    assert (paging_managed.live, paging_managed.retained) == (0, 0)
