"""The simulated device itself: values, orders of work, waits and faults are those of a device."""

from __future__ import annotations

import copy
import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from device.simulated import Order, allocations, driver, launches, noted_faults, waits


def test_values_are_those_of_the_cpu() -> None:
    """Products, gradients, factorisations, reductions and masks."""
    left, right = torch.randn(16, 8), torch.randn(8, 4)
    torch.testing.assert_close((left.cuda() @ right.cuda()).cpu(), left @ right)
    plain = torch.nn.Linear(8, 8)
    moved = copy.deepcopy(plain).cuda()
    plain(left).square().sum().backward()
    moved(left.cuda()).square().sum().backward()
    torch.testing.assert_close(moved.weight.grad.cpu(), plain.weight.grad)
    q, r = torch.linalg.qr(left.cuda())
    torch.testing.assert_close((q @ r).cpu(), left)
    numbers = torch.arange(10, device="cuda")
    assert numbers[numbers > 5].tolist() == [6, 7, 8, 9]
    assert torch.nonzero(torch.tensor([1, 0, 2], device="cuda")).tolist() == [[0], [2]]


def test_values_of_any_layout() -> None:
    """Views, mixed dtypes and in-place operations that change a part of a tensor."""
    x = torch.arange(24.0).view(4, 6)
    y = x.cuda()
    y[1:3, ::2] = x.cuda().half().t()[0:3, 1:3].t() * 2
    x[1:3, ::2] = x.half().t()[0:3, 1:3].t() * 2
    assert torch.equal(y.cpu(), x)
    stacked = torch.stack([torch.tensor(1).cuda(), torch.tensor(5).cuda()])
    assert torch.rsub(torch.pow(0.5, stacked), 1).tolist() == [0.5, 0.96875]


@pytest.mark.order("late")
def test_late_work_runs_when_it_is_waited_for() -> None:
    """A copy from locked memory takes what lies there when the device gets to it."""
    source = torch.zeros(4).pin_memory()
    there = source.to("cuda", non_blocking=True)
    source.fill_(1)
    assert there.tolist() == [1, 1, 1, 1]


@pytest.mark.order("eager")
def test_eager_work_runs_at_once() -> None:
    """A copy from locked memory takes what lies there when it is queued."""
    source = torch.zeros(4).pin_memory()
    there = source.to("cuda", non_blocking=True)
    source.fill_(1)
    assert there.tolist() == [0, 0, 0, 0]


def test_streams_wait_for_events() -> None:
    """What one stream wrote is there for another that waits, and in the late order is not for one that does not."""
    values = torch.ones(5).pin_memory()
    target = torch.zeros(5, device="cuda")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        target.copy_(values * 3, non_blocking=True)
        done = stream.record_event()
    torch.cuda.current_stream().wait_event(done)
    assert (target + 0).tolist() == [3, 3, 3, 3, 3]


def test_two_threads_may_wait_at_once() -> None:
    """For one stream, whose work each of them then runs: in its order, and no thread goes on before it is done."""
    for _ in range(5):
        x = torch.zeros(1 << 20, device="cuda")
        for _ in range(20):
            x = x * 2 + 1
        event = torch.cuda.current_stream().record_event()
        with ThreadPoolExecutor(1) as thread:
            other = thread.submit(event.synchronize)
            values = x.cpu()
            other.result()
        assert (values == float(2**20 - 1)).all()


@pytest.mark.order("late")
def test_a_forgotten_wait_is_seen() -> None:
    """The late order gives a stream that does not wait the old values."""
    target = torch.zeros(5, device="cuda")
    values = torch.ones(5).pin_memory()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        target.copy_(values, non_blocking=True)
    assert (target + 0).tolist() == [0, 0, 0, 0, 0]


def test_waits_are_listed_with_their_places() -> None:
    """Reading a value waits, a copy from locked memory does not."""
    x = torch.randn(8).cuda()
    locked = torch.randn(8).pin_memory()
    with waits() as noted:
        locked.cuda(non_blocking=True)
    assert not noted
    with waits() as noted:
        x.sum().item()
    assert len(noted) == 1
    assert "test_waits_are_listed" in str(noted[0])


def test_launches_are_counted() -> None:
    """One for an operation of one kernel, none for a view."""
    x = torch.ones(8, device="cuda")
    before = launches()
    x.view(2, 4)
    assert launches() == before
    x.add_(1)
    assert launches() == before + 1


def test_allocations_by_the_driver_are_counted() -> None:
    """torch's allocator asks the driver once, and gives the same memory out again."""
    torch.cuda.empty_cache()
    before = allocations()
    torch.empty(1 << 25, device="cuda")
    assert allocations() == before + 1
    torch.empty(1 << 25, device="cuda")
    assert allocations() == before + 1


def test_a_tensor_is_printed_with_its_values() -> None:
    """As a failing test shows it."""
    assert repr(torch.ones(2, device="cuda") + 1) == "tensor([2., 2.], device='cuda:0')"


def test_mixed_devices_raise() -> None:
    """torch's own checks run."""
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(4, device="cuda") + torch.ones(4, device="cuda:1")
    with pytest.raises(RuntimeError, match="same device"):
        torch.linalg.solve_triangular(torch.eye(4, device="cuda"), torch.eye(4, device="cuda:1"), upper=False)


def test_memory_is_torchs_own() -> None:
    """Allocations go through torch's allocator and come back to it."""
    gc.collect()
    before = torch.cuda.memory_allocated()
    x = torch.empty(1 << 20, device="cuda")
    # A piece that an earlier test gave back is split where a MiB would be left.
    assert 4 << 20 <= torch.cuda.memory_allocated() - before <= 5 << 20
    del x
    assert torch.cuda.memory_allocated() == before


@pytest.mark.order("late")
def test_a_copy_to_memory_that_is_no_longer_locked_is_a_fault() -> None:
    """Registered memory that is given up under a queued copy."""
    home = torch.zeros(1 << 12, dtype=torch.uint8)
    assert int(torch.cuda.cudart().cudaHostRegister(home.data_ptr(), home.numel(), 0)) == 0
    there = torch.ones(1 << 12, dtype=torch.uint8, device="cuda")
    home.copy_(there, non_blocking=True)
    with noted_faults() as noted:
        torch.cuda.cudart().cudaHostUnregister(home.data_ptr())
    assert [note.what for note in noted] == ["a queued copy writes host memory that is no longer locked"]


def test_work_on_freed_memory_is_a_fault() -> None:
    """A tensor that has no hold on its memory outlives it."""

    class Borrowed:
        def __init__(self, owner: Tensor) -> None:
            self.__cuda_array_interface__ = {
                "shape": tuple(owner.shape), "typestr": "<f4", "data": (owner.data_ptr(), False), "version": 3
            }  # fmt: skip

    owner = torch.ones(1 << 20, device="cuda:1")
    borrowed = torch.as_tensor(Borrowed(owner), device="cuda:1")
    with noted_faults() as noted:
        borrowed.add_(1)
    assert not noted
    del owner
    torch.cuda.empty_cache()
    with noted_faults() as noted:
        borrowed.add_(1)
    assert noted
    assert all("freed or foreign" in note.what for note in noted)


def test_memory_that_may_be_locked_ends() -> None:
    """The driver refuses and torch says so."""
    driver.sim_set_lock_limit(driver.sim_locked_bytes())
    try:
        with pytest.raises(RuntimeError, match="out of memory"):
            torch.zeros(1 << 24).pin_memory()
    finally:
        driver.sim_set_lock_limit(-1)


def test_graphs_replay_their_work() -> None:
    """A replay computes on what lies in the captured tensors then."""
    x = torch.ones(4, device="cuda")
    y = torch.zeros(4, device="cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y.add_(x)
    assert y.tolist() == [0, 0, 0, 0]
    for _ in range(2):
        graph.replay()
    x.fill_(3)
    graph.replay()
    assert y.tolist() == [5, 5, 5, 5]


def test_the_order_is_the_one_asked_for(order: Order) -> None:
    """A marker chooses, by default each test runs late and at random."""
    assert order in (Order.LATE, Order.RANDOM)


def sums(deterministic: bool) -> list[Tensor]:
    """Return what each operation that adds, or writes, with atomics makes of places that come several times."""
    place, rows = torch.arange(300, device="cuda") % 5, (torch.randn(300, 8) * 10.0 ** (torch.arange(300) % 7)[:, None])
    rows, table = rows.cuda(), torch.zeros(5, 8, device="cuda", requires_grad=True)
    wide = place.unsqueeze(1).expand(300, 8)
    torch.use_deterministic_algorithms(deterministic)
    try:
        torch.nn.functional.embedding(place, table).backward(rows)
        zeros = [torch.zeros(5, 8, device="cuda") for _ in range(6)]
        return [
            zeros[0].index_add_(0, place, rows), zeros[1].scatter_add_(0, wide, rows), table.grad,
            zeros[2].scatter_reduce_(0, wide, rows, "sum"), zeros[3].index_copy_(0, place, rows),
            zeros[4].scatter_(0, wide, rows), zeros[5].index_put_((place,), rows, accumulate=True),
        ]  # fmt: skip
    finally:
        torch.use_deterministic_algorithms(False)


def test_what_has_no_order_on_a_device_has_another_each_time() -> None:
    """But for sums that torch sorts, and where it is told to keep an order; values are right in all of them."""
    torch.manual_seed(0)
    one = sums(deterministic=False)
    torch.manual_seed(0)
    other = sums(deterministic=False)
    assert [torch.equal(*pair) for pair in zip(one, other)] == [*[False] * 6, True]
    torch.testing.assert_close(one[:3], other[:3], rtol=1e-4, atol=1e-1)
    torch.manual_seed(0)
    kept = sums(deterministic=True)
    torch.manual_seed(0)
    assert all(map(torch.equal, kept, sums(deterministic=True)))
