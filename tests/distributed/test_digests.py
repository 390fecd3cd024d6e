"""A tensor's digest tells its bits from others, on views and in every dtype alike."""

from __future__ import annotations

import pytest
import torch

from lisa_kernels.distributed import digests as module
from lisa_kernels.distributed.digests import digest, digests

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_changed_element_changes_it(dtype: torch.dtype) -> None:
    """Wherever it is, and by the smallest amount."""
    values = torch.arange(1, 258).to(dtype)
    whole = digest(values)
    for place in (0, 1, 128, 256):
        other = values.clone()
        other[place] = 0
        assert digest(other) != whole


def test_exchanged_elements_and_signs_of_zero_are_told_apart() -> None:
    """A plain sum would not see the one, a comparison of values not the other."""
    assert digest(torch.tensor([1.0, 2.0])) != digest(torch.tensor([2.0, 1.0]))
    assert digest(torch.tensor([0.0])) != digest(torch.tensor([-0.0]))


def test_layout_and_portions_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """A transposed tensor has the digest of its copy, and portions add up to the whole."""
    values = torch.randn(7, 11, generator=torch.Generator().manual_seed(0))
    whole = digest(values)
    assert digest(values.t().contiguous().t()) == whole
    monkeypatch.setattr(module, "PORTION", 10)
    assert digest(values) == whole


def test_many_come_at_once_and_empty_ones_too() -> None:
    tensors = [torch.ones(3), torch.empty(0), torch.ones((), dtype=torch.bfloat16)]
    assert digests(tensors).tolist() == [int(digest(tensor)) for tensor in tensors]
    assert digests([]).shape == (0,)
