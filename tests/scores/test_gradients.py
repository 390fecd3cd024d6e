"""Gradient norms against plain autograd, and nothing left behind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lisa_kernels.errors import InputError
from lisa_kernels.scores.gradients import gradient_norms

from .tiny_models import MODELS, llama, padded_batches


def defined_norms(model: nn.Module, blocks: list[nn.Module], batches: list[dict[str, Tensor]]) -> list[float]:
    """Return the norms of the gradient of the mean loss, of all batches at once."""
    losses = []
    for batch in batches:
        labels = batch["input_ids"].clone()
        labels[batch["attention_mask"] == 0] = -100
        losses.append(model(**{"labels": labels, **batch}).loss)
    loss = torch.stack(losses).mean()
    return [
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(block.parameters()), retain_graph=True)])
        .double()
        .norm()
        .item()
        for block in blocks
    ]


@pytest.mark.parametrize("name", MODELS)
def test_norms_equal_those_of_the_mean_gradient(name: str) -> None:
    model, blocks = MODELS[name]()
    model.eval()
    batches = padded_batches(3)
    assert gradient_norms(model, blocks, iter(batches)) == pytest.approx(
        defined_norms(model, blocks, batches), rel=1e-4
    )


def test_labels_of_the_batch_are_used() -> None:
    model, blocks = llama()
    batches = [{**batch, "labels": (batch["input_ids"] + 1) % 61} for batch in padded_batches()]
    assert gradient_norms(model, blocks, batches) == pytest.approx(defined_norms(model, blocks, batches), rel=1e-4)
    assert gradient_norms(model, blocks, batches) != pytest.approx(
        gradient_norms(model, blocks, padded_batches()), rel=1e-4
    )


def test_frozen_blocks_are_scored_and_stay_frozen() -> None:
    model, blocks = llama()
    expected = gradient_norms(model, blocks, padded_batches())
    model.requires_grad_(False)
    with torch.no_grad():
        assert gradient_norms(model, blocks, padded_batches()) == pytest.approx(expected, rel=1e-5)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_gradients_and_flags_are_as_before_also_after_an_error() -> None:
    model, blocks = llama()
    blocks[0].requires_grad_(False)
    kept = {name: torch.randn_like(p) for name, p in model.named_parameters() if "layers.1" in name or "embed" in name}
    for name, gradient in kept.items():
        model.get_parameter(name).grad = gradient
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    values = {name: gradient.clone() for name, gradient in kept.items()}

    def check() -> None:
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == flags[name]
            assert parameter.grad is kept.get(name)
            assert not parameter._post_accumulate_grad_hooks
        assert all(torch.equal(kept[name], value) for name, value in values.items())

    gradient_norms(model, blocks, padded_batches())
    check()
    with pytest.raises(IndexError):
        gradient_norms(model, blocks, [*padded_batches(), {"input_ids": torch.full((1, 4), 10_000)}])
    check()


def test_gradient_checkpointing_changes_nothing() -> None:
    model, blocks = llama()
    model.train()
    expected = gradient_norms(model, blocks, padded_batches())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert gradient_norms(model, blocks, padded_batches()) == pytest.approx(expected, rel=1e-5)


def test_a_bf16_model_sums_its_gradients_in_fp32() -> None:
    """In bf16 a sum over 300 equal batches stops growing at 256 of them."""
    model, blocks = llama()
    model.to(torch.bfloat16)
    batch = padded_batches(1)[0]
    batch = {name: value[:, :3] for name, value in batch.items()}
    assert gradient_norms(model, blocks, [batch] * 300) == pytest.approx(
        gradient_norms(model, blocks, [batch]), rel=1e-3
    )


def test_a_block_without_gradient_is_refused() -> None:
    model, blocks = llama()
    with pytest.raises(InputError, match="block 3"):
        gradient_norms(model, [*blocks, llama()[1][0]], padded_batches())


def test_a_batch_without_supervised_token_is_refused() -> None:
    model, blocks = llama()
    batch = padded_batches(1)[0]
    with pytest.raises(InputError, match="batch 0 is nan"):
        gradient_norms(model, blocks, [{**batch, "labels": torch.full_like(batch["input_ids"], -100)}])


def test_a_model_without_loss_is_refused() -> None:
    model, blocks = llama()
    ids = padded_batches(1)[0]["input_ids"]

    class Headless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = model.model

        def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
            return self.body(input_ids)

    with pytest.raises(InputError, match="Headless returned no loss"):
        gradient_norms(Headless(), blocks, [{"input_ids": ids}])
