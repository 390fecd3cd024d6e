"""Head and cross entropy, a few hundred rows at a time, in plain PyTorch.

For rows h [c, n] with labels y: logits z = h Wᵀ + b + s · (h Pᵀ) B, loss = Σ logsumexp(z) − z[y], and with
d = softmax(z) − onehot(y), times the slope where a model scales or caps its logits, the gradients
dh = d W + s · d Bᵀ P, dB = s · (h Pᵀ)ᵀ d, db = Σ d: formed in the pass that computes the loss. So is dW = dᵀ h in
float32; in 16 bits it comes later, in bands of V, from the logsumexp of each row, so that it is rounded once. No logits
outlive their chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lisa_kernels.ops.lowrank_linear.products import matmul, sum_of_outer_products
from lisa_kernels.ops.resting import RestingWeight
from lisa_kernels.ops.resting_linear import linear_with, times

LOGSUMEXP_ROWS = 32
# The label of rows that count for nothing: no class of any vocabulary, and no mistake that someone makes.
NO_LABEL = -(1 << 62)


class Curve(NamedTuple):
    """What a model makes of the logits of its output layer: cap · tanh(scale · z / cap), or scale · z without a cap."""

    scale: float = 1.0
    cap: float | None = None

    def bend_(self, logits: Tensor) -> Tensor:
        """Return the model's logits in the place of the layer's."""
        if self.cap is not None:
            return logits.mul_(self.scale / self.cap).tanh_().mul_(self.cap)
        return logits if self.scale == 1.0 else logits.mul_(self.scale)

    def slope(self, bent: Tensor) -> Tensor | float:
        """Return the derivative of the model's logits `bent` by the layer's."""
        return self.scale if self.cap is None else (bent / self.cap).square_().neg_().add_(1.0).mul_(self.scale)


class Head(NamedTuple):
    """The output layer: W [V, n], bias [V] or None, and a slot B float32 [r, V] with basis P [r, n], or neither.

    slot_is_zero promises that B is zero now and saves its products. A weight at rest never trains by itself, and is
    there a tile of the vocabulary at a time, once for the logits of a chunk and once for their gradient.
    """

    weight: Tensor | RestingWeight
    bias: Tensor | None = None
    slot: Tensor | None = None
    basis: Tensor | None = None
    scale: float = 1.0
    slot_is_zero: bool = False
    curve: Curve = Curve()

    @property
    def reads_slot(self) -> bool:
        """Whether the slot changes the logits."""
        return self.slot is not None and not self.slot_is_zero


class Gradients(NamedTuple):
    """Where the gradients of the summed loss go; None for what needs none. All but `hidden` are float32."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    slot: Tensor | None


def spans(length: int, step: int) -> Iterator[slice]:
    """Yield slices of `step` rows that cover `length`."""
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def logits_of(rows: Tensor, head: Head, band: slice = slice(None)) -> Tensor:
    """Return the logits of `rows` [c, n] for one band of the vocabulary, float32 [c, band]."""
    if isinstance(head.weight, RestingWeight):
        assert band == slice(None), "bands are for the gradient of a weight"
        logits = linear_with(head.weight, rows, None).to(torch.float32)
    else:
        logits = matmul(rows, head.weight[band].t()).to(torch.float32)
    if head.reads_slot and head.slot is not None and head.basis is not None:
        projected = matmul(rows, head.basis.to(rows.dtype).t()).to(torch.float32)
        logits.addmm_(projected, head.slot[:, band], alpha=head.scale)
    return head.curve.bend_(logits if head.bias is None else logits.add_(head.bias[band]))


def errors_of(logits: Tensor, total: Tensor, labels: Tensor, curve: Curve, start: int = 0) -> Tensor:
    """Return slope · (softmax − onehot) [c, band] in the place of `logits`.

    total: their logsumexp over the whole vocabulary. The band starts at class `start`.
    """
    slope = curve.slope(logits)
    errors = logits.sub_(total.unsqueeze(1)).exp_()
    place = labels - start
    inside = (place >= 0) & (place < errors.shape[1])
    hits = torch.where(inside, -1.0, 0.0).unsqueeze(1)
    errors.scatter_add_(1, torch.where(inside, place, 0).unsqueeze(1), hits)
    return errors if curve == Curve() else errors.mul_(slope)


def logsumexp_of(logits: Tensor) -> Tensor:
    """Return the logsumexp of each row, a few at a time: it takes a copy of what it is given."""
    return torch.cat([part.logsumexp(1) for part in logits.split(LOGSUMEXP_ROWS)])


def chunk_loss(rows: Tensor, labels: Tensor, head: Head, gradients: Gradients) -> tuple[Tensor, Tensor]:
    """Return (summed loss of `rows` [c, n], float32 0-d; logsumexp of each row, float32 [c]) and add to `gradients`.

    gradients.hidden is the chunk's own [c, n]. Of a row with `NO_LABEL` the loss is 0 and the logsumexp infinite, so
    that its softmax, and with it every gradient, is exactly 0.
    """
    logits = logits_of(rows, head)
    left_out = labels == NO_LABEL
    total = logsumexp_of(logits)
    scores = logits.gather(1, labels.masked_fill(left_out, 0).unsqueeze(1)).squeeze(1)
    loss = (total - scores).masked_fill_(left_out, 0.0).sum()
    total.masked_fill_(left_out, torch.inf)
    if not any(gradient is not None for gradient in gradients):
        return loss, total
    errors = errors_of(logits, total, labels, head.curve)
    narrow = errors.to(rows.dtype)
    if gradients.hidden is not None:
        dh = times(narrow, head.weight) if isinstance(head.weight, RestingWeight) else matmul(narrow, head.weight)
        if head.reads_slot and head.slot is not None and head.basis is not None:
            dh = dh + (head.scale * (errors @ head.slot.t() @ head.basis.to(torch.float32))).to(dh.dtype)
        gradients.hidden.copy_(dh)
    if gradients.weight is not None:
        gradients.weight.addmm_(errors.t(), rows)
    if gradients.bias is not None:
        gradients.bias.add_(errors.sum(0))
    if gradients.slot is not None and head.basis is not None:
        gradients.slot.add_(
            sum_of_outer_products(matmul(rows, head.basis.to(rows.dtype).t()), narrow), alpha=head.scale
        )
    return loss, total


class HeadGradient:
    """The gradient G = dᵀ h [V, n] of the summed loss with respect to W, known by its factors and never formed.

    d [tokens, V] is made anew, chunk by chunk, each time it is asked for. total: logsumexp of each row, float32.
    """

    def __init__(self, rows: Tensor, labels: Tensor, head: Head, total: Tensor, chunk_rows: int) -> None:
        self.rows, self.labels, self.head, self.total = rows, labels, head, total
        self.chunk_rows = chunk_rows

    @property
    def shape(self) -> tuple[int, int]:
        """(V, n)."""
        return self.head.weight.shape[0], self.rows.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the factors live."""
        return self.rows.device

    def _errors(self, span: slice) -> Tensor:
        return errors_of(logits_of(self.rows[span], self.head), self.total[span], self.labels[span], self.head.curve)

    def bands(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (d [c, V], h [c, n]) of each chunk, in float32; of no rows where there is none."""
        for span in spans(max(len(self.rows), 1), self.chunk_rows):
            yield self._errors(span), self.rows[span].to(torch.float32)

    def project(self, basis: Tensor) -> Tensor:
        """Return P · Gᵀ, float32 [r, V], for `basis` P [r, n]."""
        result = torch.zeros(len(basis), self.shape[0], dtype=torch.float32, device=self.device)
        for span in spans(len(self.rows), self.chunk_rows):
            rows = self.rows[span]
            projected = matmul(rows, basis.to(rows.dtype).t())
            result += sum_of_outer_products(projected, self._errors(span).to(rows.dtype))
        return result

    def whole(self, factor: Tensor, dtype: torch.dtype) -> Tensor:
        """Return factor · G in `dtype`, in bands of V whose errors are as large as a chunk's."""
        gradient = torch.empty(self.shape, dtype=dtype, device=self.device)
        band_rows = max(1, self.chunk_rows * self.shape[0] // max(len(self.rows), 1))
        for band in spans(self.shape[0], band_rows):
            errors = errors_of(
                logits_of(self.rows, self.head, band), self.total, self.labels, self.head.curve, band.start
            )
            gradient[band] = sum_of_outer_products(errors.mul_(factor).to(self.rows.dtype), self.rows)
        return gradient
