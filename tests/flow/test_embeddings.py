"""What all groups share: patches, head, embeddings of time and class."""

from __future__ import annotations

import pytest
import torch

from lisa_kernels import InputError
from lisa_kernels.flow.embeddings import ClassEmbedding, Head, Patches, TimeEmbedding


def test_a_token_is_a_square_of_pixels_and_the_head_puts_it_back() -> None:
    """With matrices that keep numbers as they are, images of another width than height come back."""
    shape = (3, 4, 8)
    patches, head = Patches(*shape, 2, 12), Head(*shape, 2, 12, 12)
    images = torch.arange(2 * 3 * 4 * 8, dtype=torch.float32).reshape(2, *shape)
    with torch.no_grad():
        for linear in (patches.linear, head.linear):
            linear.weight.copy_(torch.eye(12))
            linear.bias.zero_()
        patches.places.zero_()
        head.norm = torch.nn.Identity()
        tokens = patches(images)
        assert torch.equal(tokens[0, 1].reshape(3, 2, 2), images[0, :, :2, 2:4])
        assert torch.equal(head(tokens, torch.zeros(2, 12)), images)


def test_a_new_head_says_no_velocity() -> None:
    assert not Head(1, 4, 4, 2, 8, 8)(torch.randn(2, 4, 8), torch.randn(2, 8)).any()


@pytest.mark.parametrize("patch", [0, 3, 16])
def test_patches_that_do_not_divide_an_image_are_refused(patch: int) -> None:
    with pytest.raises(InputError, match=f"8 × 4 pixels cannot be cut into patches of {patch}"):
        Patches(1, 4, 8, patch, 8)


def test_times_that_differ_little_are_told_apart() -> None:
    """Half a thousandth as well as a half."""
    embedding = TimeEmbedding(16)
    first, near, far = embedding(torch.tensor([0.5, 0.5005, 1.0]))
    assert (first - near).norm() > 1e-4
    assert (first - far).norm() > (first - near).norm()


def test_no_class_has_a_vector_of_its_own() -> None:
    embedding = ClassEmbedding(3, 8)
    assert embedding.any == 3
    vectors = embedding(torch.arange(4))
    assert len({tuple(vector.tolist()) for vector in vectors}) == 4
