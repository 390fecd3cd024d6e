"""Uniform sampling."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

from lisa_kernels.samplers import UniformSampler


def test_every_subset_is_equally_likely() -> None:
    counts = Counter(UniformSampler(5, 2, seed=1).draw(k) for k in range(10_000))
    assert set(counts) == set(combinations(range(5), 2))
    # Chi-squared with 9 degrees of freedom exceeds 33 once in 7,000 seeds.
    assert sum((count - 1000) ** 2 / 1000 for count in counts.values()) < 33


def test_inclusion_is_the_share_of_active_layers() -> None:
    assert UniformSampler(8, 2).inclusion_probabilities() == [0.25] * 8
