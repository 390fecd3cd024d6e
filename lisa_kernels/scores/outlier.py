"""Outlier ratio of each block (OwLore, arXiv 2405.18380): how many of its weights matter far more than the mean."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lisa_kernels.errors import InputError
from lisa_kernels.progress import progress_bar
from lisa_kernels.scores.calibration import calibration_inputs, evaluation_mode, without_logits
from lisa_kernels.scores.matrices import block_linears, check_blocks, fp32_rows


class _InputEnergies:
    """Sum the squares of each linear's input features over tokens, as forward pre-hooks see them.

    Costs 8 bytes of host memory per input feature. An input that does not keep the mask's [batch, tokens] shape, as
    that of a routed expert, is counted whole; one that is not of a matrix's input features, as a layer with a forward
    of its own may take, not at all.
    """

    def __init__(self, linears: Mapping[nn.Module, Tensor]) -> None:
        self.mask: Tensor | None = None
        self._widths = {module: weight.shape[1] for module, weight in linears.items()}
        self._sums: dict[nn.Module, Tensor] = {}

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        features = args[0] if args else next(iter(kwargs.values()), None)
        if not isinstance(features, Tensor) or features.shape[-1:] != (self._widths[module],):
            return
        features = features.detach()
        leading = features.shape[:-1]
        tokens = features.reshape(-1, features.shape[-1])
        if self.mask is not None and leading in (self.mask.shape, (self.mask.numel(),)):
            tokens = tokens[self.mask.to(features.device).reshape(-1)]
        if not len(tokens):
            return
        energy = tokens.float().square().sum(0).to("cpu", torch.float64)
        self._sums[module] = self._sums[module] + energy if module in self._sums else energy

    def norms(self, module: nn.Module) -> Tensor | None:
        """Return the L2 norm of each input feature, fp64 [in features], or None if no token came by."""
        return self._sums[module].sqrt() if module in self._sums else None


@torch.no_grad()
def outlier_ratios(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    batches: Iterable[Mapping[str, Tensor]],
    threshold: float = 13.0,
) -> list[float]:
    """Return, per block, the fraction of entries with A > threshold * mean(A), where A_ij = ||X_j||_2 * |W_ij|.

    X_j is input feature j over all calibration tokens that no `attention_mask` excludes; the mean and the fraction are
    over all linears of the block together. A linear that saw no token (an expert never routed to) counts with zero
    norm. Experts fused into 3-D parameters are no linears and are left out. The model runs in evaluation mode; modes
    and hooks are as before when this returns or raises. Raises `InputError` for a block without linears or tokens.
    """
    check_blocks(blocks)
    if not math.isfinite(threshold) or threshold <= 0:
        raise InputError(f"the outlier threshold is {threshold}: give a positive number, such as 13.")
    linears = [block_linears(block) for block in blocks]
    for index, found in enumerate(linears):
        if not found:
            raise InputError(f"block {index} ({type(blocks[index]).__name__}) has no linear layer to score.")
    energies = _InputEnergies({module: weight for found in linears for module, weight in found.items()})
    modules = {module for found in linears for module in found}
    hooks = [module.register_forward_pre_hook(energies, with_kwargs=True) for module in modules]
    try:
        with evaluation_mode(model), progress_bar("layer scores", batches) as advance:
            for inputs in calibration_inputs(model, batches):
                mask = inputs.get("attention_mask")
                energies.mask = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
                model(**without_logits(model, inputs))
                advance()
    finally:
        for hook in hooks:
            hook.remove()
    return [_outlier_ratio(index, found, energies, threshold) for index, found in enumerate(linears)]


def _outlier_ratio(
    index: int, linears: Mapping[nn.Module, Tensor], energies: _InputEnergies, threshold: float
) -> float:
    """Return the fraction of outliers of one block in two passes over its weights, a few rows at a time."""
    norms = {module: energies.norms(module) for module in linears}
    if all(norm is None for norm in norms.values()):
        raise InputError(
            f"no calibration token reached a linear layer of block {index}: check that the blocks belong to the model "
            f"and that the attention masks are not all zero."
        )
    seen = [
        (weight, norm.to(weight.device, torch.float32))
        for (module, weight) in linears.items()
        if (norm := norms[module]) is not None
    ]
    entries = sum(weight.numel() for weight in linears.values())
    total = math.fsum((rows.abs() @ norm).sum().item() for weight, norm in seen for rows in fp32_rows(weight))
    if not math.isfinite(total):
        raise InputError(f"block {index} has weights or calibration activations that are not finite.")
    limit = threshold * total / entries
    outliers = sum(int((rows.abs() * norm > limit).sum().item()) for weight, norm in seen for rows in fp32_rows(weight))
    return outliers / entries
