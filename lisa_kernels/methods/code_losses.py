"""What a model loses for each matrix that rests in few bits, measured by one forward and backward of some tokens.

A weight's error Δ moves an output by Δx, and the loss by gᵀΔx with g its gradient there: over tokens and over errors
that know nothing of either, half of Σ Δ_ij² E[x_j²] E[g_i²] is the second order of the loss in Δ, the diagonal of a
Kronecker-factored Fisher matrix (K-FAC, arXiv 1503.05671). Targets are drawn from the model itself, as that asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from lisa_kernels.layers import Visits, is_conv1d, output_layer
from lisa_kernels.methods.precision import CodeLoss
from lisa_kernels.ops.resting import RestingWeight, quantize_resting, rows_of_a_tile
from lisa_kernels.paging.freed import give_back_freed_memory
from lisa_kernels.progress import progress_bar
from lisa_kernels.scores.calibration import calibration_inputs, evaluation_mode

# More batches change few picks.
BATCHES = 4


def measure_code_losses(
    model: nn.Module, layers: Iterable[nn.Module], batches: Iterable[Mapping[str, Tensor]],
    blocks: Iterable[nn.Module] = (), device: torch.device | None = None,
) -> dict[nn.Module, CodeLoss] | None:  # fmt: skip
    """Return what each linear layer loses in 4 bits and in 8; None of a model that gives no logits, or no numbers.

    batches: (input_ids, …) of text, of which the first few are read; of random tokens other matrices lose most. blocks:
    the model's, of which each keeps its inputs and computes the rest again in the backward. device: where blocks and
    output layer compute, and hold one of them at a time; None: where the model is. The model is as it was when this
    returns or raises. Costs two forwards and a backward a batch, without weight gradients, and the quantisation of
    every matrix in both ways.
    """
    layers = list(dict.fromkeys(layers))
    if not layers:
        return {}
    visits = Visits(model, blocks, device, head=output_layer(model))
    batches = list(islice(batches, BATCHES))
    generator = torch.Generator().manual_seed(0)
    # Each layer forwards and back again in each batch, and then its matrix.
    with progress_bar("what matrices lose in few bits", len(layers) * (2 * len(batches) + 1)) as advance:
        energies = {layer: _Energies(visits, advance) for layer in layers}
        with _prepared(model, energies, visits):
            for inputs in calibration_inputs(model, batches):
                if not _go_back(model, inputs, generator):
                    return None
        tokens = max((energy.tokens for energy in energies.values()), default=0)
        return {layer: energy.losses(layer, tokens) for layer, energy in energies.items()}


class _Energies:
    """Sums of squares of a layer's inputs [n] and of its outputs' gradients [m], over its tokens."""

    def __init__(self, visits: Visits, advance: Callable[[], None]) -> None:
        self._visits, self._advance = visits, advance
        self.tokens, self.inputs, self.gradients = 0, torch.zeros(()), torch.zeros(())

    def __call__(self, layer: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        """Take a forward in, as a forward hook is called; the graph begins at the first outputs."""
        first = not self._visits.again
        if first:
            x = args[0].detach()
            self.tokens += x.numel() // x.shape[-1]
            self.inputs = self.inputs + _squares(x)
            self._advance()
            give_back_freed_memory()
        if not y.requires_grad:
            # A copy, which may be changed in place.
            y = y.detach().requires_grad_().clone()
        if first:
            y.register_hook(self._take)
        return y

    def _take(self, gradient: Tensor) -> None:
        self.gradients = self.gradients + _squares(gradient)
        self._advance()
        # What blocks have let go of would come to as much as they hold at once, and more with each.
        give_back_freed_memory()

    @torch.no_grad()
    def losses(self, layer: nn.Module, tokens: int) -> CodeLoss:
        """Return what a token loses on average."""
        self._advance()
        if not self.tokens or not self.inputs.dim() or not self.gradients.dim():
            return CodeLoss(0.0, 0.0)
        weight = layer.weight
        assert isinstance(weight, Tensor)
        weight = weight.detach()
        matrix = weight.t().contiguous() if is_conv1d(layer) else weight
        # The matrix comes to them, in tiles.
        gradients = self.gradients.to(self.inputs.device)
        sums = dict.fromkeys(("nf4", "int8"), 0.0)
        step = rows_of_a_tile(matrix.shape[1])
        for start in range(0, len(matrix), step):
            part = matrix[start : start + step].to(self.inputs.device).contiguous()
            for kind in sums:
                resting = RestingWeight(*quantize_resting(part, kind), kind, *part.shape)
                errors = resting.woken(torch.float32).sub_(part).square_()
                sums[kind] += float(gradients[start : start + step] @ (errors @ self.inputs))
        give_back_freed_memory()
        return CodeLoss(*(0.5 * total / (self.tokens * tokens) for total in sums.values()))


def _squares(values: Tensor) -> Tensor:
    return values.reshape(-1, values.shape[-1]).to(torch.float32).square().sum(0)


@contextmanager
def _prepared(model: nn.Module, energies: Mapping[nn.Module, _Energies], visits: Visits) -> Iterator[None]:
    """Have the layers' forwards heard, and no parameter get a gradient."""
    trained = [param for param in model.parameters() if param.requires_grad]
    handles = [layer.register_forward_hook(energy) for layer, energy in energies.items()]  # type: ignore[arg-type]
    try:
        for param in trained:
            param.requires_grad_(False)
        with evaluation_mode(model), visits:
            yield
    finally:
        for handle in handles:
            handle.remove()
        for param in trained:
            param.requires_grad_(True)


@torch.enable_grad()
def _go_back(model: nn.Module, inputs: Mapping[str, Any], generator: torch.Generator) -> bool:
    """Run a batch forward, draw a target for each token from what the model says, and go back from their loss.

    Returns whether it says numbers.
    """
    # From its labels a decoder beside an encoder makes what it reads.
    two = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    said = model(**{name: value for name, value in inputs.items() if two or name != "labels"})
    logits = getattr(said, "logits", None)
    if not isinstance(logits, Tensor):
        return False
    rows = logits.detach().reshape(-1, logits.shape[-1])
    if not bool(rows.isfinite().all()):
        return False
    gradient = rows.softmax(-1, dtype=torch.float32)
    drawn = torch.multinomial(gradient.cpu(), 1, generator=generator).to(rows.device)
    # Of minus the log probability of what was drawn, in place: a graph of these would hold the logits many times.
    gradient.scatter_add_(-1, drawn, gradient.new_tensor(-1.0).expand_as(drawn))
    mask = None if two else inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.numel() == len(rows):
        gradient *= mask.reshape(-1, 1).to(torch.bool)
    logits.backward(gradient.to(logits.dtype).view_as(logits))
    return True
