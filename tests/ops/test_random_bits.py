"""The random numbers are fixed integers of (seed, step, parameter, element) and look like nothing but chance."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from tolerances import CHI_SQUARE_DEVIATIONS, STANDARD_ERRORS
from torch import Tensor

from lisa_kernels.ops.random_bits import (
    key_base,
    keys_at,
    moment_bits,
    number_key,
    random_floats,
    random_key,
    random_words,
    round_to_bfloat16,
    weight_bits,
)

MASK32, MASK64 = (1 << 32) - 1, (1 << 64) - 1
COUNT = 1 << 16
# (seed, step, parameter, element, word, and its numbers for the first moment, the second and the weight)
KNOWN = [
    (0, 0, 0, 0, 0x00000000, 0x00000, 0x00000, 0x0000),
    (0, 1, 0, 0, 0x36B612A0, 0x36B61, 0x612A0, 0x589B),
    (0, 1, 0, 1, 0x1AD25160, 0x1AD25, 0x25160, 0xE872),
    (42, 1000, 17, 123456789, 0x5A8E2396, 0x5A8E2, 0xE2396, 0x87BB),
    (7, 3, 2, (1 << 32) + 5, 0x11000633, 0x11000, 0x00633, 0xA9F0),
    (-1, 1, 1, 255, 0x6EDAA34A, 0x6EDAA, 0xAA34A, 0x4AD7),
]


def key_of(seed: int, step: int, parameter: int, device: torch.device | None = None) -> Tensor:
    return random_key(seed, parameter, torch.tensor(step, dtype=torch.int64, device=device))


def mix64(value: int) -> int:
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK64
    return value ^ (value >> 31)


def mix32(value: int) -> int:
    value = ((value ^ (value >> 16)) * 0x7FEB352D) & MASK32
    value = ((value ^ (value >> 15)) * 0x846CA68B) & MASK32
    return value ^ (value >> 16)


def word_in_integers(seed: int, step: int, parameter: int, element: int) -> int:
    """Return the word by Python's integers, from the formula in the module's docstring."""
    base = mix64(seed & MASK64) + parameter * 0x9E3779B97F4A7C15
    key = mix64((mix64(base & MASK64) + step * 0xD1B54A32D192ED03) & MASK64)
    base = mix32((key + (element >> 32) * 0x9E3779B9) & MASK32) ^ (key >> 32)
    return (mix32(((element & MASK32) >> 2) ^ base) * 0xD9CECE9F ** (element % 4)) & MASK32


def fields(key: Tensor, count: int = COUNT) -> dict[str, Tensor]:
    """Return the three fields that rounding uses: 20 bits for each moment and 16 for the weight."""
    words = random_words(key, 0, count)
    return {"m": moment_bits(words, True), "v": moment_bits(words, False), "weight": weight_bits(words)}


def one_of_four(values: Tensor) -> Tensor:
    """Return what the lowest bits are tested on: four elements share a hash and, in their words, its lowest bits."""
    return values[::4]


def chi_square_deviation(cells: Tensor, count: int) -> float:
    """Return how many standard deviations the chi-square statistic of `cells` in [0, count) lies above its mean."""
    seen = torch.bincount(cells, minlength=count).double()
    expected = cells.numel() / count
    statistic = float(((seen - expected) ** 2 / expected).sum())
    return (statistic - (count - 1)) / math.sqrt(2 * (count - 1))


@pytest.mark.parametrize(("seed", "step", "parameter", "element", "word", "m", "v", "weight"), KNOWN)
def test_the_words_are_the_pinned_integers(
    seed: int, step: int, parameter: int, element: int, word: int, m: int, v: int, weight: int, device: torch.device
) -> None:
    words = random_words(key_of(seed, step, parameter, device), element, 1)
    numbers = moment_bits(words, True), moment_bits(words, False), weight_bits(words)
    assert [int(number) for number in (words, *numbers)] == [word, m, v, weight]


@pytest.mark.parametrize("seed", [0, 1, -3, 2**40 + 7, 2**63 + 5])
def test_the_words_follow_the_formula_in_integers(seed: int) -> None:
    for step, parameter, element in itertools.product(
        (0, 1, 10**9), (0, 5, (1 << 32) + 5), (0, 255, 2**32 - 1, 2**40 + 3)
    ):
        word = int(random_words(key_of(seed, step, parameter), element, 1))
        assert word == word_in_integers(seed, step, parameter, element)


@pytest.mark.parametrize("start", [1, 255, 256, 4096, 2**32 - 7, 2**32 + 1], ids=str)
def test_the_words_do_not_depend_on_where_a_chunk_starts(start: int) -> None:
    key = key_of(3, 4, 5)
    base = max(0, start - 300)
    whole = random_words(key, base, 700)
    part = random_words(key, start, 300)
    assert torch.equal(whole[start - base : start - base + 300], part)


def test_elements_beyond_32_bits_get_words_of_their_own() -> None:
    key = key_of(0, 1, 2)
    low, high, higher = (random_words(key, start, COUNT) for start in (0, 2**32, 2**33))
    for one, other in itertools.combinations((low, high, higher), 2):
        assert int((one == other).sum()) <= 1


def test_all_keys_of_a_grid_differ() -> None:
    grid = itertools.product(range(12), range(12), range(12))
    keys = {int(key_of(seed, step, parameter)) for seed, step, parameter in grid}
    assert len(keys) == 12**3


@pytest.mark.parametrize(
    "other", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 0, 1 << 32)],
    ids=["seed", "step", "parameter", "seed-and-step", "parameter-beyond-32-bits"],
)  # fmt: skip
@pytest.mark.parametrize("field", ["m", "v", "weight"])
def test_streams_of_other_keys_are_uncorrelated(other: tuple[int, int, int], field: str) -> None:
    one = fields(key_of(0, 0, 0))[field].double()
    two = fields(key_of(*other))[field].double()
    correlation = float(torch.corrcoef(torch.stack([one, two]))[0, 1])
    assert abs(correlation) <= STANDARD_ERRORS / math.sqrt(COUNT)


def test_the_correlation_check_sees_a_stream_that_ignores_the_key() -> None:
    one = fields(key_of(0, 0, 0))["m"].double()
    assert abs(float(torch.corrcoef(torch.stack([one, one]))[0, 1])) > STANDARD_ERRORS / math.sqrt(COUNT)


@pytest.mark.parametrize(("field", "width"), [("m", 20), ("v", 20), ("weight", 16)])
def test_every_bit_is_set_half_of_the_time(field: str, width: int) -> None:
    values = one_of_four(fields(key_of(1, 2, 3))[field])
    assert int(values.min()) >= 0
    assert int(values.max()) < 1 << width
    for bit in range(width):
        share = float(((values >> bit) & 1).double().mean())
        assert abs(share - 0.5) <= STANDARD_ERRORS * 0.5 / math.sqrt(len(values))


@pytest.mark.parametrize(("field", "width"), [("m", 20), ("v", 20), ("weight", 16)])
@pytest.mark.parametrize("end", ["top", "bottom"])
def test_fields_are_uniform_by_chi_square(field: str, width: int, end: str) -> None:
    values = fields(key_of(1, 2, 3))[field]
    cells = values >> (width - 8) if end == "top" else one_of_four(values & 255)
    assert abs(chi_square_deviation(cells, 256)) <= CHI_SQUARE_DEVIATIONS


@pytest.mark.parametrize("lag", [0, 1, 256])
@pytest.mark.parametrize("pair", list(itertools.combinations_with_replacement(("m", "v", "weight"), 2)), ids="-".join)
def test_fields_are_independent_of_one_another_and_of_neighbours(pair: tuple[str, str], lag: int) -> None:
    if pair[0] == pair[1] and lag == 0:
        return
    values = fields(key_of(7, 8, 9))
    shift = {"m": 16, "v": 16, "weight": 12}
    for low in (False, True):
        one, two = (values[name] & 15 if low else values[name] >> shift[name] for name in pair)
        cells = one * 16 + two.roll(lag)
        assert chi_square_deviation(one_of_four(cells) if low else cells, 256) <= CHI_SQUARE_DEVIATIONS


def test_the_chi_square_check_sees_a_plain_counter() -> None:
    """Negative control: the golden-ratio counter without its hash is far too even."""
    counter = (torch.arange(COUNT) * 0x9E3779B9) & MASK32
    assert abs(chi_square_deviation(counter >> 24, 256)) > CHI_SQUARE_DEVIATIONS


@pytest.mark.parametrize("lag", [0, 1, 2, 3])
@pytest.mark.parametrize("pair", list(itertools.product(("m", "v", "weight"), repeat=2)), ids="-".join)
@pytest.mark.parametrize("chance", [1 / 16, 1 / 100], ids=str)
def test_rare_events_meet_as_often_as_chance_would_have_it(pair: tuple[str, str], lag: int, chance: float) -> None:
    """A moment that moves once in a hundred steps must not do so just when a weight, or a neighbour's, rounds down.

    Neighbours are those of the same four, whose words are multiples of one hash.
    """
    if pair[0] == pair[1] and lag == 0:
        return
    width = {"m": 20, "v": 20, "weight": 16}
    values = fields(key_of(5, 6, 7), 1 << 20)
    sides = [values[name][place::4] for name, place in zip(pair, (0, lag))]
    for above in itertools.product((False, True), repeat=2):
        edges = [int(chance * (1 << width[name])) for name in pair]
        events = [
            side >= (1 << width[name]) - edge if high else side < edge
            for name, side, edge, high in zip(pair, sides, edges, above)
        ]
        both = float((events[0] & events[1]).double().mean())
        assert abs(both - chance**2) <= STANDARD_ERRORS * chance / math.sqrt(len(sides[0]))


def test_the_check_of_rare_events_sees_a_factor_without_mixing() -> None:
    """Negative control: three times a number below a hundredth is below three hundredths."""
    words = random_words(key_of(5, 6, 7), 0, 1 << 20)[::4]
    low, tripled = words < MASK32 / 100, ((3 * words) & MASK32) < MASK32 / 100
    assert abs(float((low & tripled).double().mean()) - 1e-4) > STANDARD_ERRORS * 0.01 / math.sqrt(len(words))


def test_keys_of_many_parameters_are_those_of_each() -> None:
    clock = torch.tensor(77)
    bases = torch.tensor([key_base(3, index) for index in (0, 5, 1 << 33)])
    assert keys_at(bases, clock).tolist() == [int(random_key(3, index, clock)) for index in (0, 5, 1 << 33)]


@pytest.mark.parametrize("value", [1.0, -1.0, 1.2345678, -3.3e-5, 7.7e20, 1e-40])
def test_bfloat16_rounding_is_exact_in_the_mean_over_all_bits(value: float) -> None:
    values = torch.full((1 << 16,), value)
    rounded = round_to_bfloat16(values, torch.arange(1 << 16)).double()
    assert rounded.mean().item() == values[0].double().item()
    assert rounded.unique().numel() <= 2


def test_bfloat16_rounding_never_moves_what_bfloat16_holds() -> None:
    values = torch.randn(1000).bfloat16()
    for bits in (0, 1, 0xFFFF):
        assert torch.equal(round_to_bfloat16(values.float(), torch.full((1000,), bits)), values)


def float_in_integers(key: int, element: int) -> float:
    """Return the number of `random_floats` by Python's integers."""
    word = mix32(mix32(element ^ (key & MASK32)) ^ (key >> 32 & MASK32))
    return ((word >> 16) + (word & 0xFFFF) - 0xFFFF) * (6.0 / MASK32) ** 0.5


def test_random_floats_are_the_formulas_of_any_part(device: torch.device) -> None:
    for seed, step in ((0, 0), (7, 3), (-1, 1 << 40)):
        key = number_key(seed, 11, step)
        assert key == int(key_of(seed, step, 11))
        found = random_floats(key, 5, 1000, device)
        assert found.dtype == torch.float32
        wanted = torch.tensor([float_in_integers(key, 5 + place) for place in range(1000)], dtype=torch.float64)
        torch.testing.assert_close(found.double().cpu(), wanted, rtol=2**-22, atol=0)
        assert torch.equal(found[300:], random_floats(key, 305, 700, device))


def test_random_floats_have_mean_zero_variance_one_and_no_neighbours(device: torch.device) -> None:
    found = random_floats(number_key(3, 1, 4), 0, COUNT, device).double()
    error = COUNT**-0.5
    assert abs(float(found.mean())) < STANDARD_ERRORS * error
    # The square of a sum of two uniform numbers has variance 1.4.
    assert abs(float(found.square().mean()) - 1.0) < STANDARD_ERRORS * 1.4**0.5 * error
    for lag in (1, 2, 3, 4, 64, 1024):
        assert abs(float((found[lag:] * found[:-lag]).mean())) < STANDARD_ERRORS * error
    other = random_floats(number_key(3, 1, 5), 0, COUNT, device).double()
    assert abs(float((found * other).mean())) < STANDARD_ERRORS * error
