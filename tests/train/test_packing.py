"""How full packed rows are, and batches of rows end to end."""

from __future__ import annotations

import random
from itertools import chain

import pytest
import torch

from lisa_kernels.train.chat import IGNORED, Example
from lisa_kernels.train.packing import collate_flat, full_rows, longest_example, packed_rows, row_of

# How many of GSM8K's questions with their worked answers have 96-111, 112-127, … tokens, as SmolLM2's tokenizer counts.
GSM8K = (
    47, 282, 514, 723, 801, 800, 718, 653, 567, 509, 427, 336, 229, 227, 150, 132, 101, 90, 41, 34, 25, 22, 10, 13, 11,
    4,
)  # fmt: skip


def questions_and_answers(seed: int) -> list[int]:
    """Return lengths distributed as those of GSM8K, in a random order."""
    generator = random.Random(seed)
    lengths = [96 + 16 * place + generator.randrange(16) for place, count in enumerate(GSM8K) for _ in range(count)]
    generator.shuffle(lengths)
    return lengths


@pytest.mark.parametrize(("capacity", "most"), [(512, 0.02), (640, 0.005), (768, 0.005), (1024, 0.005), (2048, 0.005)])
def test_rows_of_questions_and_answers_are_full(capacity: int, most: float) -> None:
    """A row of 512 has room for 2.4 of them, the hardest of these; first come, first put leaves 7.6 % empty."""
    lengths = questions_and_answers(seed=capacity)
    assert 1 - sum(lengths) / (len(full_rows(lengths, capacity)) * capacity) < most


@pytest.mark.parametrize("seed", range(20))
def test_every_example_is_in_one_row_that_has_room_for_it(seed: int) -> None:
    """Over distributions of all shapes, never with more rows than one each, and in the order of the examples."""
    generator = random.Random(seed)
    capacity, largest = generator.choice([(8, 8), (100, 60), (100, 9), (1000, 1000)])
    lengths = [generator.randint(1, largest) for _ in range(generator.randrange(200))]
    rows = full_rows(lengths, capacity)
    assert sorted(chain.from_iterable(rows)) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in row) <= capacity for row in rows)
    assert rows == sorted(sorted(row) for row in rows)


@pytest.mark.parametrize(
    ("lengths", "capacity", "rows"),
    [
        ([], 8, []),
        ([8], 8, [[0]]),
        ([5, 6, 3, 2, 10, 4], 10, [[0, 2, 3], [1, 5], [4]]),
        ([1] * 7, 3, [[0, 1, 2], [3, 4, 5], [6]]),
        ([7, 7, 7], 10, [[0], [1], [2]]),
        # The two long ones share a row, although one of them and two short ones would fill it too.
        ([50, 25, 25, 25, 25, 50], 100, [[0, 5], [1, 2, 3, 4]]),
    ],
    ids=["none", "one", "all-full", "ones", "none-fit", "long-together"],
)
def test_small_sets_are_packed_as_well_as_can_be(lengths: list[int], capacity: int, rows: list[list[int]]) -> None:
    assert full_rows(lengths, capacity) == rows


def example(*ids: int) -> Example:
    return Example(list(ids), [IGNORED, *ids[1:]])


def test_rows_end_to_end_have_no_padding_and_tell_where_examples_end() -> None:
    rows = [row_of([example(1, 2), example(3, 4, 5)], packing=True), row_of([example(6, 7)], packing=True)]
    batch = collate_flat(rows)
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[1, 2, 3, 4, 5, 6, 7]],
        "labels": [[IGNORED, 2, IGNORED, 4, 5, IGNORED, 7]],
        "position_ids": [[0, 1, 0, 1, 2, 0, 1]],
        "attention_mask": [[[[0, 2, 5, 7]]]],
    }
    assert batch["attention_mask"].dtype == torch.int32


def test_rows_of_one_example_each_are_examples_of_a_batch_and_none_predicts_another() -> None:
    rows = [{"input_ids": torch.tensor(ids), "labels": torch.tensor(ids)} for ids in ([1, 2, 3], [4, 5])]
    batch = collate_flat(rows)
    assert batch["labels"].tolist() == [[IGNORED, 2, 3, IGNORED, 5]]
    assert batch["attention_mask"].flatten().tolist() == [0, 3, 5]


def test_the_longest_example_is_found_in_packed_rows_and_in_others() -> None:
    alone = [row_of([example(*range(n))], packing=False) for n in (3, 5, 2)]
    assert [longest_example(rows) for rows in (alone, packed_rows(alone, 8), [])] == [5, 5, 0]
