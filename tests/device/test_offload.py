"""Checkpoints in host memory: no loss changes, nothing waits, and a late device takes no more of the host's memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import llama

from device.simulated import waits
from device.training import batch
from lisa_kernels import FullFineTune, attach
from lisa_kernels.layers import find_blocks, offload_checkpoints

STEPS = 4


def run(offloaded: bool) -> tuple[list[float], list[Any], Any]:
    """Return the losses of some steps, what the last one waited for, and the model."""
    model = llama().to("cuda")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if offloaded:
        offload_checkpoints(model)
    opt = attach(model, FullFineTune(), lr=1e-2, max_grad_norm=1.0)
    batches, losses = [batch("cuda", seed) for seed in range(STEPS)], []
    torch.cuda.synchronize()
    for inputs in batches:
        with waits() as noted:
            loss = model(**inputs).loss
            loss.backward()
            opt.step()
        opt.zero_grad()
        losses.append(loss.detach())
    return [float(loss) for loss in losses], noted, model


def test_losses_are_those_of_checkpoints_on_the_device() -> None:
    plain, offloaded = run(False), run(True)
    assert offloaded[0] == plain[0]


@pytest.mark.order("late")
def test_a_buffer_of_the_host_for_each_block_is_all_there_is() -> None:
    """The device has come to none of the copies when the next step's are queued; none of them makes the host wait."""
    _, noted, model = run(True)
    blocks = find_blocks(model)[1]
    copies = blocks[0]._gradient_checkpointing_func.args[0]
    assert sum(map(len, copies._free.values())) == len(blocks)
    assert not [note for note in noted if "host_copies" in str(note)]
