"""The matrices of a block are found by structure."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lisa_kernels.errors import InputError
from lisa_kernels.scores.matrices import block_linears, block_matrices, check_blocks, fp32_rows

from .tiny_models import MODELS


@pytest.mark.parametrize(("name", "count"), [("llama", 7), ("gpt2", 4)])
def test_linears_have_their_input_features_last(name: str, count: int) -> None:
    _, blocks = MODELS[name]()
    found = block_linears(blocks[0])
    assert len(found) == count
    with torch.no_grad():
        for module, weight in found.items():
            x = torch.randn(2, weight.shape[1])
            bias = getattr(module, "bias", None)
            expected = x @ weight.T + (0 if bias is None else bias)
            torch.testing.assert_close(module(x), expected)


def test_norms_embeddings_and_subclasses_are_told_apart() -> None:
    class Special(nn.Linear):
        pass

    block = nn.Sequential(nn.Embedding(5, 3), nn.LayerNorm(3), Special(3, 4))
    assert list(block_linears(block)) == [block[2]]


def test_fused_experts_are_a_stack_of_matrices() -> None:
    block = nn.Module()
    block.experts = nn.Parameter(torch.zeros(3, 4, 5))
    assert {name: tuple(matrix.shape) for name, matrix in block_matrices(block).items()} == {
        f"experts[{i}]": (4, 5) for i in range(3)
    }


def test_rows_cover_the_matrix_in_fp32() -> None:
    matrix = torch.randn(7, 3, dtype=torch.bfloat16)
    rows = torch.cat(list(fp32_rows(matrix)))
    assert rows.dtype == torch.float32
    assert torch.equal(rows, matrix.float())


def test_no_blocks_are_refused() -> None:
    with pytest.raises(InputError, match="no decoder block"):
        check_blocks([])


def test_weights_on_meta_are_refused() -> None:
    with pytest.raises(InputError, match="meta"):
        check_blocks([nn.Linear(2, 2, device="meta")])


def test_quantised_weights_are_refused() -> None:
    block = nn.Module()
    block.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(InputError, match="without quantisation"):
        check_blocks([block])


def test_a_layer_with_a_slot_is_read_as_the_one_it_stands_for() -> None:
    """Of a model that is attached: weights stored transposed have their input features last here too."""
    from transformers.pytorch_utils import Conv1D

    from lisa_kernels.layers import LowRankLinear

    for original, stored in ((nn.Linear(10, 12), False), (Conv1D(12, 10), True)):
        layer = LowRankLinear(original, 2)
        (found,) = block_linears(layer).values()
        assert torch.equal(found, original.weight.t() if stored else original.weight)
