"""Births, deaths and categories, on small real tensors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lisa_kernels.plan.trace import CATEGORIES, Trace
from lisa_kernels.plan.tracker import PRECEDENCE, StorageTracker

FLOAT = 4


def watching() -> StorageTracker:
    tracker = StorageTracker("cpu")
    tracker.recording = True
    return tracker


def births(trace: Trace) -> list[tuple[int, str, str]]:
    return [(event.bytes, event.category, event.phase) for event in trace.events if event.bytes > 0]


def test_every_category_has_its_precedence() -> None:
    """A storage that is several things counts as one of them, whichever they are."""
    assert sorted(PRECEDENCE) == sorted(CATEGORIES)


def test_a_storage_lives_as_long_as_its_last_view() -> None:
    """One birth for a tensor and its views; the death comes with the last of them, in the phase that it falls in."""
    tracker = watching()
    with tracker:
        with tracker.phase("first"):
            whole = torch.zeros(8)
            view = whole[2:4].view(2, 1)
            del whole
        with tracker.phase("second"):
            assert len(tracker.trace().events) == 1
            del view
    born, died = tracker.trace().events
    assert (born.bytes, born.phase, born.operation) == (8 * FLOAT, "first", "aten.zeros.default")
    assert (died.bytes, died.phase, died.storage) == (-8 * FLOAT, "second", born.storage)


def test_a_number_is_never_used_again() -> None:
    """Storages that follow each other at one address are different storages."""
    tracker = watching()
    with tracker:
        for _ in range(5):
            torch.zeros(1000)
    numbers = [event.storage for event in tracker.trace().events if event.bytes > 0]
    assert len(set(numbers)) == 5
    assert tracker.trace().peak_bytes == 1000 * FLOAT


def test_nothing_is_noted_of_other_devices_of_no_bytes_and_before_recording() -> None:
    """Host tensors of a rehearsal, empty tensors, and what the preparation made."""
    tracker = StorageTracker("cpu")
    with tracker:
        early = torch.zeros(4)
        tracker.recording = True
        torch.zeros(0)
        elsewhere = torch.zeros(4, device="meta")
        early.add_(1.0)
    assert not elsewhere.is_cpu
    assert births(tracker.trace()) == [(16, "temporaries", "")]


def test_in_place_operations_and_views_make_nothing() -> None:
    """Only fresh storage counts."""
    tracker = watching()
    with tracker:
        x = torch.ones(6)
        x.mul_(2.0).t()
        x.detach().view(2, 3).add_(x.view(2, 3))
    assert len(births(tracker.trace())) == 1


def test_what_a_forward_makes_and_a_backward_reads_was_saved() -> None:
    """Of x → x² → exp the backward reads x² no more, but exp's result and x; the sum is read by nobody."""
    tracker = watching()
    x = torch.ones(10, requires_grad=True)
    with tracker:
        with tracker.phase("forward", "forward"):
            middle = x.square()
            result = middle.exp()
            loss = result.sum()
        with tracker.phase("backward", "backward"):
            torch.autograd.backward(loss)
    named = {event.operation: event.category for event in tracker.trace().events if event.bytes > 0}
    assert named["aten.exp.default"] == "saved activations"
    assert named["aten.pow.Tensor_Scalar"] == "temporaries"
    assert middle.numel() == 10


def test_a_label_goes_back_to_the_birth_and_a_weaker_one_changes_nothing() -> None:
    """A temporary that becomes a gradient was one all along."""
    tracker = watching()
    with tracker, tracker.phase("backward", "backward"):
        tensor = torch.zeros(3)
    tracker.label([tensor, None], "gradients")
    tracker.label([tensor], "loss")
    tracker.label_saved()
    assert births(tracker.trace()) == [(12, "gradients", "backward")]


def test_what_is_left_of_a_forward_is_saved_and_nothing_older() -> None:
    """What other phases left keeps its name."""
    tracker = watching()
    with tracker:
        with tracker.phase("step"):
            older = torch.zeros(1)
        with tracker.phase("forward", "forward"):
            result = torch.zeros(2)
    tracker.label_saved()
    assert births(tracker.trace()) == [(4, "temporaries", "step"), (8, "saved activations", "forward")]
    assert older.numel() + result.numel() == 3


def test_what_was_there_before_is_born_when_it_is_labelled() -> None:
    """Weights are older than the tracker."""
    weight = torch.zeros(5)
    tracker = watching()
    with tracker.phase("attach"):
        tracker.label([weight, weight.view(1, 5)], "weights")
    assert births(tracker.trace()) == [(20, "weights", "attach")]


class Raising(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise ValueError("on purpose")


def test_modules_are_followed_also_where_one_raises() -> None:
    """The innermost running module is named, and a forward that raises leaves its module behind."""
    model = nn.Sequential(nn.Sequential(nn.Tanh()), nn.Tanh())
    tracker = watching()
    with tracker, tracker.following(model):
        model(torch.ones(2))
        with pytest.raises(ValueError, match="on purpose"), tracker.following(broken := nn.Sequential(Raising())):
            broken(torch.ones(2))
        model(torch.ones(2))
    modules = [event.module for event in tracker.trace().events if event.operation == "aten.tanh.default"]
    assert modules == ["0.0", "1", "0.0", "1"]
    assert not any(module._forward_hooks for module in model.modules())
