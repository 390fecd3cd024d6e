"""Gradient norm of each block on calibration batches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lisa_kernels.distributed import units_of
from lisa_kernels.errors import InputError
from lisa_kernels.progress import progress_bar
from lisa_kernels.scores.calibration import calibration_inputs
from lisa_kernels.scores.matrices import check_blocks


def gradient_norms(
    model: nn.Module, blocks: Sequence[nn.Module], batches: Iterable[Mapping[str, Tensor]]
) -> list[float]:
    """Return, per block, the L2 norm of the gradient of its parameters, averaged over the batches.

    One backward per batch; a batch without `labels` has its `input_ids` as labels, padding left out. The model stays
    in the mode that it is in, so that gradient checkpointing works and dropout acts as in training. Frozen blocks are
    scored as well; every `requires_grad` and `.grad` is as before when this returns or raises.

    Bytes: 4 per block parameter on the host, where gradients go one by one in the course of a backward, and one
    parameter's gradient on the model's device.
    """
    check_blocks(blocks)
    if units_of(model):
        raise InputError(
            "gradient norms are measured on a whole model, and this one is under fully_shard; use another kind of "
            'score, or scores="gradient-norm" of a method, which measures them as it trains.'
        )
    parameters = list(dict.fromkeys(parameter for block in blocks for parameter in block.parameters()))
    sums: dict[nn.Parameter, Tensor] = {}

    def take(parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient = parameter.grad.detach().to("cpu", torch.float32)
        parameter.grad = None
        key = by_id[id(parameter)]
        sums[key] = sums[key].add_(gradient) if key in sums else gradient.clone()

    by_id = {id(parameter): parameter for parameter in parameters}
    count = 0
    bar = progress_bar("layer scores", batches)
    with _only_these_train(model, parameters), torch.enable_grad(), bar as advance:
        hooks = [parameter.register_post_accumulate_grad_hook(take) for parameter in parameters]
        try:
            for count, inputs in enumerate(calibration_inputs(model, batches), start=1):
                _calibration_loss(model, inputs, count - 1).backward()
                advance()
        finally:
            for hook in hooks:
                hook.remove()
    return [_block_norm(index, block, sums, count) for index, block in enumerate(blocks)]


@contextmanager
def _only_these_train(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let only these parameters require grad, with no gradient yet; put everything back at the end."""
    everything = dict.fromkeys([*model.parameters(), *parameters])
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in everything]
    try:
        for parameter in everything:
            parameter.requires_grad_(False)
            parameter.grad = None
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, required, gradient in before:
            parameter.requires_grad_(required)
            parameter.grad = gradient


def _calibration_loss(model: nn.Module, inputs: dict[str, Any], index: int) -> Tensor:
    """Return the model's own loss on one batch."""
    if inputs.get("labels") is None:
        if "input_ids" not in inputs:
            raise InputError(f"calibration batch {index} has neither 'labels' nor 'input_ids': the loss needs one.")
        labels, mask = inputs["input_ids"], inputs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.shape == labels.shape:
            labels = labels.masked_fill(mask == 0, -100)
        inputs = {**inputs, "labels": labels}
    loss = getattr(model(**inputs), "loss", None)
    if not isinstance(loss, Tensor):
        raise InputError(
            f"{type(model).__name__} returned no loss: the gradient norm needs a model with a language modelling head."
        )
    if not bool(loss.isfinite()):
        raise InputError(
            f"the loss of calibration batch {index} is {loss.item()}: give batches with at least one supervised token."
        )
    return loss


def _block_norm(index: int, block: nn.Module, sums: Mapping[nn.Parameter, Tensor], batches: int) -> float:
    """Return the norm of one block's mean gradient, given the sums over batches."""
    gradients = [sums[parameter] for parameter in block.parameters() if parameter in sums]
    if not gradients:
        raise InputError(
            f"no gradient reached block {index}: check that the blocks belong to the model, and use gradient "
            f"checkpointing with use_reentrant=False if at all."
        )
    return math.sqrt(math.fsum(gradient.square().sum().item() for gradient in gradients)) / batches
