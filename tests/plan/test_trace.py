"""What a trace tells of the events that it was given."""

from __future__ import annotations

import pytest

from lisa_kernels.plan.trace import CATEGORIES, Event, Trace


def event(storage: int, size: int, category: str = "temporaries", phase: str = "forward") -> Event:
    return Event(storage, size, category, phase, "aten.mm.default", "")


@pytest.fixture
def trace() -> Trace:
    """A weight that stays, and two others that come and go; the peak is reached twice."""
    return Trace(
        [
            event(0, 100, "weights", "attach"),
            event(1, 30),
            event(2, 20, "saved activations"),
            event(1, -30),
            event(3, 30, phase="backward"),
            event(3, -30, phase="backward"),
            event(2, -20, "saved activations", "backward"),
        ]
    )


def test_the_timeline_is_the_running_sum(trace: Trace) -> None:
    """Bytes after each event, deaths included."""
    assert trace.timeline() == [100, 130, 150, 120, 150, 120, 100]


def test_the_peak_is_the_first_of_its_height(trace: Trace) -> None:
    """Where a peak is reached again, the moment named is the first."""
    assert (trace.peak_bytes, trace.peak_index) == (150, 2)


def test_what_is_alive_is_split_by_category(trace: Trace) -> None:
    """Every category is named, and the parts sum to the bytes alive at that event."""
    for index, total in enumerate(trace.timeline()):
        live = trace.live_at(index)
        assert tuple(live) == CATEGORIES
        assert sum(live.values()) == total
    assert trace.live_at(4)["saved activations"] == 20
    assert [birth.storage for birth in trace.alive_at(4)] == [0, 2, 3]


def test_a_phase_begins_with_what_the_one_before_left(trace: Trace) -> None:
    """A phase that only frees has its beginning as its peak."""
    assert trace.phases() == {"attach": 100, "forward": 150, "backward": 150}
    falling = Trace([event(0, 50, phase="first"), event(0, -50, phase="second")])
    assert falling.phases() == {"first": 50, "second": 50}


def test_an_empty_trace_has_a_peak_of_nothing() -> None:
    """No event, no bytes."""
    empty = Trace([])
    assert (empty.peak_bytes, empty.peak_index, empty.timeline(), empty.phases()) == (0, 0, [], {})
