"""What a training step sees."""

from __future__ import annotations

import torch

from lisa_kernels.flow.batches import Batches
from lisa_kernels.flow.data import Images


def batches(size: int = 4, dropout: float = 0.0, seed: int = 0, count: int = 10) -> Batches:
    pixels = torch.arange(count, dtype=torch.float32).reshape(-1, 1, 1, 1)
    return Batches(Images(pixels, torch.arange(count), tuple("abcdefghij")), size, dropout, 10, seed)


def test_each_pass_sees_every_image_once_in_an_order_of_its_own() -> None:
    """Also where batches lie across passes, and where one is longer than a pass."""
    for size in (4, 25):
        seen = torch.cat([batches(size)[number].labels for number in range(100 // size)])
        passes = seen.reshape(-1, 10)
        assert all(sorted(one.tolist()) == list(range(10)) for one in passes)
        assert len({tuple(one.tolist()) for one in passes}) > 1


def test_a_batch_is_a_function_of_seed_and_number() -> None:
    first, again = batches()[7], batches()[7]
    assert torch.equal(first.noise, again.noise)
    assert torch.equal(first.pixels, again.pixels)
    assert not torch.equal(first.noise, batches()[8].noise)
    assert not torch.equal(first.noise, batches(seed=1)[7].noise)


def test_a_share_of_labels_is_left_out() -> None:
    labels = torch.cat([batches(100, dropout=0.25)[number].labels for number in range(40)])
    share = float((labels == 10).float().mean())
    # Four standard errors of 4,000 draws.
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / 4000) ** 0.5
