"""Steps within a period ask nothing of the device but work: no wait, no memory, and as few launches as recorded."""

from __future__ import annotations

import pytest
import torch
from families import llama

import lisa_kernels
from device.simulated import Order, allocations, launches, waits
from device.training import batch
from lisa_kernels import attach

PERIOD = 50
METHODS = {
    "lisa": lisa_kernels.LISA(2, PERIOD),
    "ows-adaptive": lisa_kernels.OWS(2, PERIOD, scores="gradient-norm"),
    "owlore": lisa_kernels.OwLore(2, PERIOD, rank=8, gap=5, embeddings="always"),
    "owlore-page": lisa_kernels.OwLore(2, PERIOD, rank=8, gap=5, embeddings="always", retired_state="page"),
    "owlore-low-rank": lisa_kernels.OwLore(2, PERIOD, rank=8, gap=5),
    "badam": lisa_kernels.BAdam(PERIOD),
    "galore": lisa_kernels.GaLore(rank=8, gap=5),
    "lora-fa": lisa_kernels.LoRAFA(rank=4),
    "full": lisa_kernels.FullFineTune(),
    "full-paged": lisa_kernels.FullFineTune(),
}
# Of one step of the optimizer on three blocks, a refresh of bases in it.
LAUNCHES = {
    "lisa": 60, "ows-adaptive": 100, "owlore": 145, "owlore-page": 145, "owlore-low-rank": 160, "galore": 175,
    "full-paged": 150,
}  # fmt: skip
STEPS = 6


@pytest.mark.order("eager", "late")
@pytest.mark.parametrize("name", METHODS)
def test_a_steady_step_waits_for_nothing_and_asks_for_no_memory(name: str, order: Order) -> None:
    """Forward, backward and step, bases refreshed among them.

    Of a device that never gets to its work the small locked buffers of copies are never free again: more are asked for.
    Nor does the host hear from it that a first basis is good: it is tried again, which takes more launches.
    """
    model = llama().to("cuda", torch.bfloat16)
    opt = attach(
        model, METHODS[name], lr=1e-3, calibration=[batch("cuda", 99)], max_grad_norm=1.0,
        paging="host" if name == "full-paged" else None,
    )  # fmt: skip
    batches = [batch("cuda", seed) for seed in range(STEPS)]
    most = 0
    for number, inputs in enumerate(batches):
        asked = allocations()
        with waits() as noted:
            model(**inputs).loss.backward()
            before = launches()
            opt.step()
        opt.zero_grad()
        most = max(most, launches() - before if number else 0)
        if number >= 3:
            assert not noted, f"step {number}"
            assert allocations() == asked or order is Order.LATE
    assert most <= LAUNCHES.get(name, most) or order is Order.LATE


@pytest.mark.order("eager")
def test_a_switch_by_gradient_norms_waits_once() -> None:
    """For the norms of all layers together: the control that waits are seen at all."""
    model = llama().to("cuda", torch.bfloat16)
    opt = attach(model, lisa_kernels.OWS(2, 2, scores="gradient-norm"), max_grad_norm=1.0)
    waited = []
    for seed in range(4):
        inputs = batch("cuda", seed)
        with waits() as noted:
            model(**inputs).loss.backward()
            opt.step()
        opt.zero_grad()
        waited.append([note for note in noted if "lisa_kernels" in str(note)])
    assert waited[2] == []
    assert [note.what for note in waited[3] if "Synchronize" in note.what] == ["cudaStreamSynchronize"]
    assert all("mean_norms" in note.places[0] for note in waited[3])
