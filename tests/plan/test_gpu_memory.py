"""What a GPU holds beside tensors is in a plan: workspaces by card, tables of our kernels, insides of operations."""

from __future__ import annotations

import pytest
import torch

from lisa_kernels.ops.lowrank_embedding import reference
from lisa_kernels.plan.gpu_memory import (
    LARGE_WORKSPACE_BYTES,
    NORM_TILE,
    STEP_TILES,
    TABLE_GRADIENT,
    WORKSPACE_BYTES,
    GpuMemory,
    norm_tables,
    step_tables,
)
from lisa_kernels.plan.rehearsal import rehearse
from lisa_kernels.plan.tracker import StorageTracker

from .small_runs import METHODS, workload


@pytest.mark.parametrize(
    ("capability", "wanted"),
    [
        ((7, 5), WORKSPACE_BYTES), ((8, 9), WORKSPACE_BYTES), ((9, 0), LARGE_WORKSPACE_BYTES),
        ((12, 0), LARGE_WORKSPACE_BYTES), (None, LARGE_WORKSPACE_BYTES),
    ],
)  # fmt: skip
def test_workspaces_are_those_of_the_card_that_is_here(
    capability: tuple[int, int] | None, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a card it is the largest, so that a plan made elsewhere does not say too little."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert GpuMemory.here().workspace_bytes == wanted


def test_a_rehearsal_for_a_gpu_holds_two_workspaces_throughout() -> None:
    """Of the thread of forward and step, and of autograd's; nothing that a rehearsal sees without them is lost."""
    size = 1 << 20
    plain = rehearse(workload())
    with_gpu = rehearse(workload(), gpu=GpuMemory(size))
    assert with_gpu.peak_bytes >= plain.peak_bytes + 2 * size
    assert sum(event.bytes == size for event in with_gpu.events) == 2


def test_what_lives_inside_a_low_rank_layer_is_seen_for_a_gpu() -> None:
    """Its products are several operations there, in the same phases, and what it returns is as large as before."""
    given = workload(method=METHODS["lora-fa"])
    plain, seen = rehearse(given), rehearse(given, gpu=GpuMemory(1))
    inside = {event.operation for event in seen.events} - {event.operation for event in plain.events}
    assert "aten.linear.default" in inside
    assert not any("lowrank_linear" in operation for operation in inside)
    assert list(seen.phases()) == list(plain.phases())
    assert seen.live_at(len(seen.events) - 1)["weights"] == plain.live_at(len(plain.events) - 1)["weights"]


def test_tables_of_a_norm_are_those_of_its_launches() -> None:
    """Results by tile and the table with its tiles, as the launcher makes them for tensors of two dtypes."""
    pytest.importorskip("triton", reason="Triton is not installed: it is for Linux only")
    from lisa_kernels.ops.grad_norm.triton_kernel import ELEMENTS, grad_norm_launches

    grads = [
        torch.zeros(size, dtype=dtype) for size in (3 * NORM_TILE, 17) for dtype in (torch.float32, torch.bfloat16)
    ]
    launches = grad_norm_launches(grads, squares=True)
    names = {
        (name, tensor.untyped_storage()._cdata): tensor.untyped_storage().nbytes()
        for launch in launches
        for name, tensor in launch.arguments.items()
        if isinstance(tensor, torch.Tensor)
    }
    held = {storage: size for (_, storage), size in names.items()}
    combined = sum(size for (name, _), size in names.items() if name == "largest")
    assert ELEMENTS == NORM_TILE
    assert sum(tensor.numel() * tensor.element_size() for tensor in norm_tables(grads)) == sum(held.values()) + combined


def test_large_tensors_need_no_table_of_a_step() -> None:
    """Theirs are launches of their own: a step's table grows with small tensors alone."""

    def table_bytes(elements: int) -> int:
        return sum(tensor.numel() for tensor in step_tables([torch.empty(elements, device="meta")]))

    assert table_bytes(1 << 30) == table_bytes(1 << 31) == 64 + 8 * STEP_TILES
    assert table_bytes(1025) == 64 + 8 * 2


@pytest.mark.parametrize("band", [1 << 10, 1 << 20], ids=["bands", "at once"])
def test_a_tables_gradient_holds_what_its_operations_hold(band: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the table itself; of what is planned for each token, those that sort on a GPU take a part."""
    monkeypatch.setattr(reference, "BAND", band)
    dy, ids = torch.zeros(64, 48), torch.arange(64) % 7
    tracker = StorageTracker("cpu")
    with tracker:
        tracker.recording = True
        reference.table_gradient(dy, ids, 100, 1.0, -1)
    held = tracker.trace().peak_bytes - 4 * 100 * 48 - dy.nbytes - ids.nbytes
    (planned,) = GpuMemory.inside(TABLE_GRADIENT, (dy, ids, 100, -1, False))
    assert held <= planned.nbytes <= held + 48 * 64
