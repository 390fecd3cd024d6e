"""The time of a step, from the operations of its rehearsal and a machine's seconds for each."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from lisa_kernels import LISA, FullFineTune, OwLore
from lisa_kernels.plan.duration import Duration
from lisa_kernels.plan.machines import CARDS, Seconds
from lisa_kernels.plan.rehearsal import Workload, rehearse
from lisa_kernels.plan.result import Plan
from lisa_kernels.plan.work import Operation

from .small_runs import workload


class Counting:
    """A machine that takes a second for each operation, and twice as long on a bad day."""

    name, is_cpu = "a counter", False

    def seconds(self, operation: Operation) -> tuple[Seconds, str]:
        return Seconds(1.0, 2.0), "matrices" if operation.products else "bandwidth"

    def host_seconds(self, launches: int) -> Seconds:
        return Seconds(0.0, 0.0)


class SlowHost(Counting):
    """The same with a host that takes longer to start an operation than the device for all of it."""

    def host_seconds(self, launches: int) -> Seconds:
        return Seconds(3.0 * launches, 3.0 * launches)


def plan_of(method: Any, **changes: Any) -> Plan:
    asked = dataclasses.replace(workload("llama", method), dtype="fp32", **changes)
    return Plan(asked, rehearse(asked))


def middle(duration: Duration, *parts: str) -> float:
    return sum(duration.parts[part].low for part in parts if part in duration.parts)


def test_a_step_is_the_sum_of_its_operations() -> None:
    found = plan_of(FullFineTune(), gradient_checkpointing=False).duration(Counting())
    assert found.step.low == found.launches
    assert found.step.high == 2 * found.step.low
    assert set(found.parts) == {"forward", "backward", "optimizer"}
    assert sum(found.bounds.values()) == pytest.approx(1.0)
    assert found.as_dict()["tokens_per_second_high"] == found.tokens / found.step.low


def test_micro_batches_repeat_forward_and_backward_and_nothing_else() -> None:
    """Two are rehearsed of however many."""
    two, six = (plan_of(FullFineTune(), accumulate=count).duration(Counting()) for count in (2, 6))
    for part in ("forward", "recomputation", "backward"):
        assert middle(six, part) == pytest.approx(3 * middle(two, part))
    assert middle(six, "optimizer") == pytest.approx(middle(two, "optimizer"))
    assert six.launches == round(six.step.low)
    # The optimizer multiplies no matrices here.
    assert six.products == 3 * two.products
    assert six.bytes < 3 * two.bytes
    assert six.tokens == 3 * two.tokens


@pytest.mark.slow
def test_a_switch_is_spread_over_its_period() -> None:
    method = OwLore(2, rank=4, scores="uniform")
    often, seldom, never = (
        plan_of(dataclasses.replace(method, period=period)).duration(Counting()).step.low for period in (1, 4, 10**6)
    )
    assert often > never + 100
    assert seldom - never == pytest.approx((often - never) / 4, rel=0.01)


def test_what_a_switch_does_itself_is_no_part_of_the_other_steps() -> None:
    """The rehearsed step that is like all others ends with one."""
    method = OwLore(2, rank=4, scores="uniform")
    often, never = (plan_of(dataclasses.replace(method, period=period)).duration(Counting()) for period in (1, 10**6))
    assert middle(often, "switch") >= 1
    assert middle(never, "switch") < 1e-3
    assert never.launches == often.launches == round(never.step.low)


def test_with_frozen_embeddings_the_backward_is_as_deep_as_the_mean_draw() -> None:
    """A plan of memory takes the deepest."""
    deep = plan_of(LISA(1, embeddings="low-rank", rank=4)).duration(Counting())
    mean = plan_of(LISA(1, embeddings="frozen")).duration(Counting())
    assert 0.3 < middle(mean, "backward") / middle(deep, "backward") < 0.85


def test_a_slow_host_is_waited_for() -> None:
    plan = plan_of(FullFineTune())
    waiting = plan.duration(SlowHost())
    assert waiting.step.low == pytest.approx(3 * waiting.launches)
    assert waiting.bound_by == "launches"
    assert plan.duration(Counting()).bound_by != "launches"


def test_a_faster_card_takes_less() -> None:
    asked = Workload("preset:small", FullFineTune(), batch_size=8, seq_len=512)
    plan = Plan(asked, rehearse(asked))
    slow, fast = (plan.duration(CARDS[name]).step for name in ("t4", "h100"))
    assert fast.high < slow.low
