"""A steady step costs the device launches of its own work: as few as recorded, no waits, no memory from the driver."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from families import DECODERS

from device.simulated import Note, allocations, launches, waits
from device.training import batch
from lisa_kernels import LISA, OWS, FullFineTune, GaLore, OwLore, attach

# Where the device is late, locked buffers of copies still queued cannot be used again, and others are asked for.
pytestmark = pytest.mark.order("eager")


class Cost(NamedTuple):
    """What one step took: launches of `step()`, waits of forward, backward and step, and memory from the driver."""

    launched: int
    waited: list[Note]
    allocated: int


# A method, where its moments are, and the most launches of a step of a model of three blocks. Bases are refreshed at
# every fifth step, so that each step has some to carry moments into.
CASES: dict[str, tuple[Any, str | None, int]] = {
    "lisa": (LISA(2, 50), None, 60),
    "owlore": (OwLore(2, 50, rank=8, gap=5), None, 165),
    "galore": (GaLore(rank=8, gap=5), None, 185),
    "full-paged": (FullFineTune(), "host", 250),
}


def costs(method: Any, paging: str | None, steps: int) -> Iterator[Cost]:
    """Train a small Llama in bfloat16 and yield the cost of each step."""
    model = DECODERS["llama"].make().to("cuda", torch.bfloat16)
    opt = attach(model, method, max_grad_norm=1.0, paging=paging, calibration=[batch("cuda", 9)])
    inputs = [batch("cuda", seed) for seed in range(steps)]
    for given in inputs:
        asked = allocations()
        with waits() as noted:
            model(**given).loss.backward()
            before = launches()
            opt.step()
            launched = launches() - before
        opt.zero_grad()
        yield Cost(launched, [note for note in noted if "lisa_kernels" in str(note)], allocations() - asked)


@pytest.mark.parametrize("name", CASES)
def test_a_steady_step_launches_little_and_neither_waits_nor_allocates(name: str) -> None:
    """The first steps make bases and state; the last of four is looked at."""
    method, paging, most = CASES[name]
    *_, last = costs(method, paging, 4)
    assert last.launched <= most
    assert [str(note) for note in last.waited] == []
    assert last.allocated == 0


def test_a_switch_by_gradient_norms_waits_once() -> None:
    """For the norms of all layers together: the control that waits are seen at all."""
    *_, before, switch = costs(OWS(2, 2, scores="gradient-norm"), None, 4)
    assert before.waited == []
    assert [note.what for note in switch.waited if "Synchronize" in note.what] == ["cudaStreamSynchronize"]
    assert all("_tell_sampler" in note.places[0] for note in switch.waited)
