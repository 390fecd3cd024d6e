"""Head and cross entropy, a few hundred rows at a time, in plain PyTorch.

For rows h [c, n] with labels y: logits z = h Wᵀ + b + s · (h Pᵀ) B, loss = Σ logsumexp(z) − z[y], and with
d = softmax(z) − onehot(y) the gradients dh = d W + s · d Bᵀ P, dW = dᵀ h, dB = s · (h Pᵀ)ᵀ d, db = Σ d. All of them
are formed in the pass that computes the loss, so that no logits outlive their chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lisa_kernels.ops.lowrank_linear.reference import matmul


class Head(NamedTuple):
    """The output layer: W [V, n], bias [V] or None, and a slot B float32 [r, V] with basis P [r, n], or neither."""

    weight: Tensor
    bias: Tensor | None = None
    slot: Tensor | None = None
    basis: Tensor | None = None
    scale: float = 1.0


@dataclass
class Gradients:
    """Sums over the chunks so far; None for what needs no gradient. All but `hidden` are float32."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    slot: Tensor | None


def logits_of(rows: Tensor, head: Head) -> tuple[Tensor, Tensor | None]:
    """Return (logits float32 [c, V], h Pᵀ [c, r] where there is a slot)."""
    logits = matmul(rows, head.weight.t()).to(torch.float32)
    projected = None
    if head.slot is not None and head.basis is not None:
        projected = matmul(rows, head.basis.t())
        logits = torch.addmm(logits, projected.to(torch.float32), head.slot, alpha=head.scale)
    return (logits if head.bias is None else logits + head.bias), projected


def chunk_loss(rows: Tensor, labels: Tensor, head: Head, at: int, gradients: Gradients | None) -> Tensor:
    """Return the summed loss of `rows` [c, n], float32 0-d, and add to `gradients`; the rows start at `at` in them."""
    logits, projected = logits_of(rows, head)
    index = labels.unsqueeze(1)
    total = torch.logsumexp(logits, dim=1, keepdim=True)
    loss = (total - logits.gather(1, index)).sum()
    if gradients is None:
        return loss
    errors = logits.sub_(total).exp_()
    errors.scatter_add_(1, index, torch.full_like(total, -1.0))
    narrow = errors.to(rows.dtype)
    if gradients.hidden is not None:
        dh = matmul(narrow, head.weight)
        if head.slot is not None and head.basis is not None:
            dh = dh + (head.scale * (errors @ head.slot.t() @ head.basis.to(torch.float32))).to(dh.dtype)
        gradients.hidden[at : at + len(rows)] = dh
    if gradients.weight is not None:
        gradients.weight.addmm_(errors.t(), rows.to(torch.float32))
    if gradients.bias is not None:
        gradients.bias.add_(errors.sum(0))
    if gradients.slot is not None and projected is not None:
        gradients.slot.addmm_(projected.to(torch.float32).t(), errors, alpha=head.scale)
    return loss
