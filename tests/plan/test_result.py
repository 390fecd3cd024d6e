"""A plan: peak, moment, split, phases, and which devices hold it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import pytest

from lisa_kernels.methods import LISA, Method
from lisa_kernels.plan.allocator import MIB, Reserve
from lisa_kernels.plan.cards import CARDS_GB, CONTEXT_BYTES
from lisa_kernels.plan.result import Plan, allocated_bytes
from lisa_kernels.plan.trace import CATEGORIES, Trace

from .traces import MB, sizes, small_run


@dataclass(frozen=True)
class Stub:
    """As much of a workload as a plan reads."""

    model: str = "preset:tiny"
    method: Method = field(default_factory=LISA)
    batch_size: int = 1


def plan_of(events: Trace) -> Plan:
    workload: Any = Stub()
    return Plan(workload, events)


def test_peak_moment_split_and_phases() -> None:
    plan = plan_of(small_run())
    assert plan.peak_bytes == 190 * MB
    assert plan.peak == ("step 1: backward", "aten.mm.default", "model.layers.3.mlp")
    assert plan.split == {
        **dict.fromkeys(CATEGORIES, 0), "weights": 100 * MB, "saved activations": 60 * MB, "gradients": 30 * MB,
    }  # fmt: skip
    assert plan.phases == {
        "attach": 100 * MB, "step 1: forward": 160 * MB, "step 1: backward": 190 * MB, "step 1: step": 145 * MB,
    }  # fmt: skip
    assert plan.timeline[-1] == 115 * MB


def test_a_device_must_hold_the_reserve_and_the_context() -> None:
    """12 MiB in a segment of its own beside the context: exactly that fits, a byte less does not."""
    plan = plan_of(sizes((1, 12 * MIB)))
    assert plan.fits(CONTEXT_BYTES + 12 * MIB)
    assert plan.margin_bytes(CONTEXT_BYTES + 12 * MIB - 1) == -1
    assert plan.margin_bytes(CONTEXT_BYTES + 12 * MIB - 1, expandable=True) == -8 * MIB - 1
    assert not plan.fits(10)


def test_a_device_on_which_caches_are_given_back_fits() -> None:
    """102 MiB are reserved where there is room; within 60 the allocator frees its cache and gets through with 52."""
    plan = plan_of(sizes((1, 12 * MIB), (2, 40 * MIB), (1, -12 * MIB), (2, -40 * MIB), (3, 50 * MIB)))
    assert plan.reserved().reserved == 102 * MIB
    assert plan.margin_bytes(CONTEXT_BYTES + 60 * MIB) == 8 * MIB
    assert plan.margin_bytes(CONTEXT_BYTES + 51 * MIB) == -51 * MIB


def test_expandable_segments_may_fit_where_fixed_ones_do_not() -> None:
    """2 MiB stay in a segment of 30, which holds no 40; the segment that grows puts them behind the 2."""
    plan = plan_of(sizes((1, 30 * MIB), (1, -30 * MIB), (2, 2 * MIB), (3, 40 * MIB)))
    fixed, expandable = (plan.margin_bytes(CONTEXT_BYTES + 65 * MIB, on) for on in (False, True))
    assert fixed < 0 <= expandable


@pytest.mark.parametrize("card", range(len(CARDS_GB)), ids=lambda index: f"{CARDS_GB[index]} GB")
def test_cards_say_what_is_left(card: int) -> None:
    """Each larger card leaves the difference more."""
    plan = plan_of(small_run())
    found = plan.cards()[card]
    assert found.gb == CARDS_GB[card]
    assert found.margin_bytes == found.bytes - CONTEXT_BYTES - plan.reserved().reserved
    assert found.margin_bytes_expandable == found.bytes - CONTEXT_BYTES - plan.reserved(expandable=True).reserved


def test_as_dict_is_json() -> None:
    values = json.loads(json.dumps(plan_of(small_run()).as_dict()))
    assert values["model"] == "preset:tiny"
    assert values["method"]["method"] == "lisa"
    assert values["peak_bytes"] == sum(values["split_bytes"].values()) == 190 * MB
    assert values["peak"]["phase"] == "step 1: backward"
    assert len(values["cards"]) == len(CARDS_GB)


def test_an_empty_trace_is_a_plan_of_nothing() -> None:
    plan = plan_of(Trace([]))
    assert (plan.peak_bytes, plan.peak.phase, plan.phases) == (0, "", {})
    assert not any(plan.split.values())


def test_blocks_may_come_out_larger_than_those_of_the_replay() -> None:
    """By a share of large plans, and by what one cut block keeps in small ones."""
    small, large = (allocated_bytes(Reserve(0, blocks, 0, 0)) - blocks for blocks in (10 * MIB, 14 << 30))
    assert small == 2 * MIB
    assert 0.0005 < large / (14 << 30) < 0.0007
