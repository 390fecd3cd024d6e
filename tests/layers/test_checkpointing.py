"""Some blocks recompute and the others keep: the same gradients, and less memory with each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import gpt2, llama, tokens

from lisa_kernels import InputError, OwLore, attach, checkpoint_blocks

LAYERS = 4


def saved_bytes(model: Any) -> int:
    """Return the bytes that a forward in training saves for its backward, weights apart."""
    weights = {param.untyped_storage().data_ptr() for param in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.train()(**tokens(2, 24))
    return sum(kept.values())


@pytest.mark.parametrize("make", [llama, gpt2], ids=["llama", "gpt2"])
def test_each_block_that_is_recomputed_saves_memory_and_changes_no_gradient(make: Any) -> None:
    """With layers that train in low rank and others that rest; the lowest blocks recompute first."""
    held, gradients = [], []
    for count in (0, 1, 3, LAYERS, None):
        model = make(layers=LAYERS).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if count != 0:
            checkpoint_blocks(model, count)
        opt = attach(model, OwLore(2, 5, rank=4, scores="uniform"), lr=1e-3)
        held.append(saved_bytes(model))
        model(**tokens(seed=3)).loss.backward()
        gradients.append(
            [param.grad for group in opt.param_groups for param in group["params"] if param.grad is not None]
        )
        recomputing = [block.gradient_checkpointing for block in blocks_of(model)]
        assert recomputing == [place < (LAYERS if count is None else count) for place in range(LAYERS)]
    assert held[0] > held[1] > held[2] > held[3] == held[4]
    for others in gradients[1:]:
        assert len(others) == len(gradients[0]) > 2
        for one, other in zip(gradients[0], others):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def blocks_of(model: Any) -> Any:
    return model.model.layers if hasattr(model, "model") else model.transformer.h


def test_more_blocks_than_there_are_are_refused() -> None:
    with pytest.raises(InputError, match=r"5 blocks cannot be recomputed: model\.layers has 4"):
        checkpoint_blocks(llama(layers=4), 5)


def test_blocks_that_do_not_recompute_one_by_one_are_refused() -> None:
    """A model whose own code decides for all of them keeps its activations, and one sentence says what works."""
    model = llama()
    for block in model.model.layers:
        block.__class__ = type("Block", (block.__class__.__mro__[2],), {"forward": block.__class__.forward})
        block.__dict__.pop("gradient_checkpointing", None)
    with pytest.raises(InputError, match="do not recompute one by one"):
        checkpoint_blocks(model, 1)
