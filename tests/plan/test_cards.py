"""Sizes: what a user writes, what a card has, and how sizes are shown."""

from __future__ import annotations

import pytest

from lisa_kernels.errors import InputError
from lisa_kernels.plan.cards import CARDS_GB, card_bytes
from lisa_kernels.sizes import gb, parse_size

SIZES = {
    "16GB": 16_000_000_000,
    "16 GB": 16_000_000_000,
    "16gb": 16_000_000_000,
    "16GiB": 17_179_869_184,
    "16000000000": 16_000_000_000,
    "7.5 GB": 7_500_000_000,
    "800 MiB": 838_860_800,
    "1.001GB": 1_001_000_000,
}


@pytest.mark.parametrize("text", SIZES)
def test_sizes(text: str) -> None:
    assert parse_size(text) == SIZES[text]


@pytest.mark.parametrize(
    "text", ["", "GB", "16 gigs", "-16GB", "0GB", "sixteen", "16G", "1e9", "nan", "16 GB of", "9" * 400]
)
def test_what_is_no_size_is_refused_and_named(text: str) -> None:
    with pytest.raises(InputError, match="is not a size: write 16GB"):
        parse_size(text)


def test_a_card_has_a_little_less_than_its_name_in_gib() -> None:
    """Never more than its GiB, and more than the 1e9 that `--fit` counts in."""
    for card in CARDS_GB:
        assert card * 10**9 < card_bytes(card) < card * 2**30


def test_sizes_are_shown_in_gb_and_small_ones_in_mb_or_kb() -> None:
    assert [gb(size) for size in (14_612_345_678, 1e9, 999_949_999, -2.5e9, 613, 0)] == [
        "14.61 GB", "1.00 GB", "999.9 MB", "-2.50 GB", "0.6 kB", "0.0 kB",
    ]  # fmt: skip
