"""Cards by name or by their rates, and what bounds an operation on one."""

from __future__ import annotations

import pytest

from lisa_kernels.errors import InputError
from lisa_kernels.plan.machines import CARDS, HOST_US, Card, card_by_name
from lisa_kernels.plan.work import Operation

CARD = Card("square", bandwidth_gb_s=1000, tflops=100, tflops_fp32=50)


def operation(products: int = 0, moved: int = 0, halves: bool = True) -> Operation:
    return Operation(None, (None, (), {}), products, moved, halves)


@pytest.mark.parametrize(
    ("asked", "bound", "least"),
    [
        (operation(products=10**12), "matrices", 1e12 / 100e12),
        (operation(products=10**12, halves=False), "matrices", 1e12 / 50e12),
        (operation(moved=10**9), "bandwidth", 1e9 / 1000e9),
        (operation(moved=100), "launches", 0.0),
    ],
)
def test_an_operation_takes_what_its_slowest_part_takes(asked: Operation, bound: str, least: float) -> None:
    """Never less than the data sheet allows, and no more than three times that where there is enough work."""
    seconds, found = CARD.seconds(asked)
    assert found == bound
    assert least < seconds.low < seconds.high
    assert not least or seconds.high < 3 * least


def test_the_host_is_slower_than_small_kernels() -> None:
    assert CARD.host_seconds(1000) == pytest.approx([each * 1e-3 for each in HOST_US])


def test_cards_are_named_or_described() -> None:
    assert card_by_name("RTX 4090") is not None
    assert card_by_name("rtx_4090").bandwidth_gb_s == CARDS["rtx-4090"].bandwidth_gb_s
    assert card_by_name("a100", bandwidth_gb_s=1555).bandwidth_gb_s == 1555
    given = card_by_name(None, 500.0, 40.0)
    assert (given.bandwidth_gb_s, given.tflops) == (500.0, 40.0)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (("rtx-4900",), ["did you mean 'rtx-4090'", "--bandwidth", "--tflops"]),
        ((None, 500.0), ["--bandwidth", "--tflops"]),
        (("a100", -1.0), ["--bandwidth is -1.0", "above 0"]),
        ((None, 500.0, float("nan")), ["--tflops is nan"]),
    ],
)
def test_what_is_no_card_is_one_sentence(given: tuple[object, ...], named: list[str]) -> None:
    with pytest.raises(InputError) as error:
        card_by_name(*given)  # type: ignore[arg-type]
    assert all(part in str(error.value) for part in named), error.value
