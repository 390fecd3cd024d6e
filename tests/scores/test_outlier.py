"""Outlier ratios against the definition, computed on a block's concatenated weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lisa_kernels.errors import InputError
from lisa_kernels.scores import matrices
from lisa_kernels.scores.outlier import outlier_ratios

from .tiny_models import MODELS, llama, padded_batches


def defined_ratios(
    model: nn.Module, blocks: list[nn.Module], batches: list[dict[str, Tensor]], threshold: float
) -> list[float]:
    """Return the ratios by the definition: every input kept, every entry of a block in one vector, in fp64."""
    inputs: dict[nn.Module, list[Tensor]] = {}
    hooks = [
        module.register_forward_pre_hook(lambda module, args: inputs.setdefault(module, []).append(args[0]))
        for block in blocks
        for module in block.modules()
        if type(module).__name__ in ("Linear", "Conv1D")
    ]
    model.eval()
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for hook in hooks:
        hook.remove()
    kept = torch.cat([batch["attention_mask"].bool().flatten() for batch in batches])
    ratios = []
    for block in blocks:
        entries = []
        for module in block.modules():
            if module in inputs:
                tokens = torch.cat([x.flatten(0, 1) for x in inputs[module]])[kept].double()
                weight = module.weight if type(module).__name__ == "Linear" else module.weight.T
                entries.append((weight.detach().double().abs() * tokens.norm(dim=0)).flatten())
        everything = torch.cat(entries)
        ratios.append((everything > threshold * everything.mean()).double().mean().item())
    return ratios


@pytest.mark.parametrize("threshold", [2.0, 3.0, 5.0])
@pytest.mark.parametrize("name", MODELS)
def test_ratios_equal_the_definition_on_concatenated_weights(name: str, threshold: float) -> None:
    model, blocks = MODELS[name]()
    batches = padded_batches()
    with torch.no_grad():
        blocks[1].get_parameter(next(n for n, p in blocks[1].named_parameters() if p.ndim == 2))[0, 0] = 5.0
    expected = defined_ratios(model, blocks, batches, threshold)
    assert outlier_ratios(model, blocks, iter(batches), threshold) == pytest.approx(expected, abs=1e-12)
    assert max(expected) > 0


def test_logits_are_not_formed_where_they_need_not_be() -> None:
    """Nor a loss: with labels in a batch the scores are the same, and the output layer sees one token of a row."""
    model, blocks = llama()
    batches = padded_batches()
    expected = outlier_ratios(model, blocks, batches, 3.0)
    seen: list[int] = []
    handle = model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    found = outlier_ratios(model, blocks, [{**batch, "labels": batch["input_ids"]} for batch in batches], 3.0)
    handle.remove()
    assert found == expected
    assert seen == [1] * len(batches)


def test_padding_is_left_out() -> None:
    """Negative control: counting the padding gives other ratios."""
    model, blocks = llama()
    batches = padded_batches(padding=9)
    unmasked = [{**batch, "attention_mask": torch.ones_like(batch["attention_mask"])} for batch in batches]
    assert outlier_ratios(model, blocks, batches, 2.0) != outlier_ratios(model, blocks, unmasked, 2.0)


@pytest.mark.parametrize("name", MODELS)
def test_planted_outlier_features_raise_the_ratio_of_their_block_only(name: str) -> None:
    model, blocks = MODELS[name]()
    batches = padded_batches()
    before = outlier_ratios(model, blocks, batches)
    norm = blocks[1].input_layernorm if name == "llama" else blocks[1].ln_1
    with torch.no_grad():
        norm.weight[3] = 400.0
    after = outlier_ratios(model, blocks, batches)
    assert after[1] > before[1] + 0.005
    assert after[0] == before[0]
    assert after[2] < 0.005


def test_a_linear_without_tokens_counts_with_zero_norm() -> None:
    model, blocks = llama()
    batches = padded_batches()
    before = outlier_ratios(model, blocks, batches, 3.0)
    entries = sum(weight.numel() for weight in matrices.block_linears(blocks[0]).values())
    blocks[0].add_module("expert_never_routed", nn.Linear(entries // 16, 16, bias=False))
    after = outlier_ratios(model, blocks, batches, 6.0)
    # Twice the entries halve the mean, so twice the threshold finds the same outliers among twice as many.
    assert after[0] == pytest.approx(before[0] / 2, rel=1e-3)


def test_rows_taken_a_few_at_a_time_give_the_same_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    model, blocks = MODELS["gpt2"]()
    whole = outlier_ratios(model, blocks, padded_batches(), 3.0)
    monkeypatch.setattr(matrices, "_CHUNK_ELEMENTS", 100)
    assert outlier_ratios(model, blocks, padded_batches(), 3.0) == whole


def test_a_bf16_model_has_the_ratios_of_its_upcast_weights() -> None:
    model, blocks = llama()
    model.to(torch.bfloat16)
    low = outlier_ratios(model, blocks, padded_batches(), 3.0)
    high = outlier_ratios(model.float(), blocks, padded_batches(), 3.0)
    assert low == pytest.approx(high, rel=0.05)


def trace(model: nn.Module) -> dict[str, Any]:
    return {
        name: (module.training, len(module._forward_pre_hooks), len(module._forward_hooks))
        for name, module in model.named_modules()
    }


def test_modes_and_hooks_are_as_before_also_after_an_error() -> None:
    model, blocks = llama()
    model.train()
    blocks[0].eval()
    model.requires_grad_(False)
    before = trace(model)
    outlier_ratios(model, blocks, padded_batches())
    assert trace(model) == before
    with pytest.raises(IndexError):
        outlier_ratios(model, blocks, [{"input_ids": torch.full((1, 4), 10_000)}])
    assert trace(model) == before
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_block_that_no_token_reaches_is_refused() -> None:
    model, blocks = llama()
    with pytest.raises(InputError, match="block 3"):
        outlier_ratios(model, [*blocks, llama()[1][0]], padded_batches())


def test_a_block_without_linears_is_refused() -> None:
    model, _ = llama()
    with pytest.raises(InputError, match="no linear layer"):
        outlier_ratios(model, [nn.LayerNorm(4)], padded_batches())


def test_weights_that_are_not_finite_are_refused() -> None:
    model, blocks = llama()
    with torch.no_grad():
        blocks[2].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"block 2.*not finite"):
        outlier_ratios(model, blocks, padded_batches())


@pytest.mark.parametrize("threshold", [0.0, -1.0, float("nan")])
def test_a_threshold_that_is_none_is_refused(threshold: float) -> None:
    model, blocks = llama()
    with pytest.raises(InputError, match="threshold"):
        outlier_ratios(model, blocks, padded_batches(), threshold)
