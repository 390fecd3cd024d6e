"""Copies in host memory come back as they were, in no more buffers than there were copies at once."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from lisa_kernels.errors import InputError
from lisa_kernels.layers.host_copies import HostCopies, locked_memory


class Stream:
    """A stream that notes for whom it waited."""

    def __init__(self) -> None:
        self.waited: list[Stream] = []

    def wait_stream(self, other: Stream) -> None:
        self.waited.append(other)


class Host:
    """Host memory that is counted, and the stream that is current."""

    def __init__(self) -> None:
        self.stream = Stream()
        self.made: list[int] = []
        self.copies = HostCopies(self.memory, lambda device: self.stream)

    def memory(self, nbytes: int) -> Tensor:
        self.made.append(nbytes)
        return torch.empty(nbytes, dtype=torch.uint8)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3, 5), torch.randn(4, 6).t(), torch.randn(2, 3, 4).bfloat16(), torch.tensor(2.5), torch.empty(0, 3),
        torch.randn(8)[::2],
    ],
    ids=["matrix", "transposed", "bfloat16", "number", "empty", "strided"],
)  # fmt: skip
def test_a_tensor_comes_back_as_it_was(tensor: Tensor) -> None:
    host = Host()
    sent = host.copies.send(tensor)
    before = tensor.clone()
    tensor.zero_()
    back = host.copies.bring_back(sent)
    assert torch.equal(back, before)
    assert back.dtype == before.dtype
    # As often as it is asked for, and as a tensor of its own.
    back.zero_()
    assert torch.equal(host.copies.bring_back(sent), before)


def test_a_buffer_serves_the_next_copy_once_its_own_is_gone() -> None:
    """The host does not ask whether the device has come to it."""
    host = Host()
    for _ in range(5):
        waiting = [host.copies.send(torch.full((10,), float(number))) for number in range(3)]
        for number, sent in reversed(list(enumerate(waiting))):
            assert (host.copies.bring_back(sent) == number).all()
        del waiting, sent
    assert host.made == [40, 40, 40]


def test_rows_of_any_length_take_no_more_buffers() -> None:
    """A longer row makes a buffer in the place of a shorter one's."""
    host = Host()
    for length in (10, 30, 20, 40, 5, 40):
        waiting = [host.copies.send(torch.ones(length)) for _ in range(2)]
        del waiting
    assert host.made == [40, 40, 120, 120, 160, 160]
    held = [buffer.numel() for free in host.copies._free.values() for buffer in free]
    assert held == [160, 160]


def test_another_stream_has_buffers_of_its_own_and_waits() -> None:
    """A copy comes back after it was sent, and its buffer serves its own stream after that."""
    host = Host()
    first = host.stream
    sent = host.copies.send(torch.ones(4))
    host.copies.bring_back(sent)
    assert not first.waited
    host.stream = second = Stream()
    host.copies.bring_back(sent)
    assert (second.waited, first.waited) == ([first], [second])
    del sent
    host.copies.send(torch.ones(4))
    assert host.made == [16, 16]


def test_training_takes_a_buffer_for_each_checkpoint() -> None:
    """Gradients are those of a run that keeps its inputs, and the second step makes nothing."""
    torch.manual_seed(0)
    blocks: Any = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    plain = copy.deepcopy(blocks)
    host = Host()
    for step in range(3):
        x = torch.randn(2, 4, requires_grad=True)
        kept = y = x
        for one, other in zip(plain, blocks):
            kept = one(kept).tanh()
            with saved_tensors_hooks(host.copies.send, host.copies.bring_back):
                y = checkpoint(lambda value, other=other: other(value).tanh(), y, use_reentrant=False)
        kept.square().sum().backward()
        y.square().sum().backward()
        del y
        assert len(host.made) == 3, step
    for one, other in zip(plain.parameters(), blocks.parameters()):
        assert torch.equal(one.grad, other.grad)


def test_a_copy_of_a_model_has_buffers_of_its_own() -> None:
    host = Host()
    host.copies.send(torch.ones(4))
    gc.collect(0)
    twin = copy.deepcopy(host.copies)
    assert host.copies._free
    assert not twin._free


@pytest.mark.skipif(torch.cuda.is_available(), reason="memory can be locked here")
def test_memory_that_cannot_be_locked_is_one_sentence() -> None:
    with pytest.raises(InputError, match=r"no 64 bytes of host memory can be locked .*ulimit"):
        locked_memory(64)
