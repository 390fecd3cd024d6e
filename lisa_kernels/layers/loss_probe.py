"""Find out whether a model's loss is the cross entropy of its output layer's logits, and what it makes of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lisa_kernels.ops.linear_cross_entropy import Curve, Head, logits_of

IGNORED = -100
# The largest logits of the two positions that a model is probed with: no soft cap changes the one, every one the other.
PROBED_LOGITS = (0.1, 100.0)
PROBED_TOKENS = 6
# What a model of another kind may raise when it is probed.
MISFITS = (TypeError, ValueError, RuntimeError, LookupError, AttributeError, AssertionError)


class Probe:
    """What a probing forward finds out: what does the model make of the logits of its output layer?"""

    def __init__(self, model: nn.Module) -> None:
        self.curves: list[Curve | None] = []
        self._constants = [1.0, *constants_of(model)]
        self._calls = 0
        self._plain: Tensor | None = None

    def positions(self, head: Head, hidden: Tensor) -> Tensor:
        """Return what the output layer reads in place of `hidden`: a position of faint logits and one of loud ones."""
        self._calls += 1
        if head.weight.is_meta:
            return hidden[..., : len(PROBED_LOGITS), :]
        drawn = torch.randn(hidden.shape[-1], generator=torch.Generator().manual_seed(0))
        row = drawn.to(hidden.device, hidden.dtype)
        head = head._replace(curve=Curve())
        faint = logits_of(row.unsqueeze(0), head._replace(bias=None))
        largest = faint.abs().max().clamp_min(torch.finfo(torch.float16).tiny)
        rows = torch.stack([row * (logit / largest) for logit in PROBED_LOGITS])
        self._plain = logits_of(rows, head).to(hidden.dtype)
        return rows.expand(*hidden.shape[:-2], -1, -1)

    def stand_in(self, layer: nn.Module, args: tuple[Tensor], logits: Tensor) -> Tensor:
        """Return logits with values, as a forward hook of an output layer without any: one of a plan.

        What the model makes of its layer's logits can be seen from any; those of its body are not needed.
        """
        drawn = torch.randn(logits.shape[-1], generator=torch.Generator().manual_seed(0))
        rows = torch.stack([drawn * (logit / drawn.abs().max()) for logit in PROBED_LOGITS]).to(logits.dtype)
        self._plain = rows
        return rows.expand(logits.shape).clone()

    def compare(self, logits: Tensor, labels: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Note the curve from the layer's logits to `logits`, and whether there is one label for each token."""
        plain, curve = self._plain, None
        if plain is not None and self._calls == 1 and tuple(labels.shape) == (1, PROBED_TOKENS):
            # Products of other shapes may be summed in another order, on GPUs in TF32.
            rounding = max(1e-3, 2 * torch.finfo(plain.dtype).eps)
            found = logits.to(torch.float32).reshape(plain.shape)
            curve = fitted_curve(plain.to(torch.float32), found, self._constants, rounding)
        self.curves.append(curve)
        return logits.new_zeros(())


def constants_of(model: nn.Module) -> list[float]:
    """Return the numbers in the configuration of the model's language part."""
    config = getattr(model, "config", None)
    get_text = getattr(config, "get_text_config", None)
    values = vars(get_text() if callable(get_text) else config).values() if config is not None else ()
    return [float(value) for value in values if isinstance(value, (int, float)) and value > 0]


def fitted_curve(plain: Tensor, found: Tensor, constants: list[float], rounding: float) -> Curve | None:
    """Return the curve with constants of the model's that takes `plain` to `found`, float32 [2, V]; None without one.

    Of the faint first row a cap takes nothing, so that it tells the scale; the second row tells the cap.
    """

    def nearest(value: float, known: list[float]) -> float | None:
        best = min(known, key=lambda constant: abs(constant - value))
        return best if abs(best - value) <= 2 * rounding * abs(value) else None

    faint, loud = plain
    scale = nearest(float((found[0] @ faint) / (faint @ faint)), [*constants, *(1.0 / value for value in constants)])
    if scale is None:
        return None
    cap, wanted, seen = None, scale * float(loud.abs().max()), float(found[1].abs().max())
    if seen < (1.0 - 2 * rounding) * wanted:
        low, high = seen, 1e3 * wanted
        for _ in range(64):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if middle * math.tanh(wanted / middle) < seen else (low, middle)
        cap = nearest(low, constants)
        if cap is None:
            return None
    curve = Curve(scale, cap)
    bent = curve.bend_(plain.clone())
    largest = bent.abs().amax(1, keepdim=True)
    return curve if bool(((bent - found).abs() <= 2 * rounding * largest).all()) else None


def is_plain_loss(loss: Callable[..., Tensor], classes: int) -> bool:
    """Return whether `loss(logits=…, labels=…, vocab_size=…)` is the mean cross entropy of the next tokens."""
    logits = torch.randn(2, PROBED_TOKENS, classes, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(2 * PROBED_TOKENS).view(2, PROBED_TOKENS) % classes
    labels[0, 2] = IGNORED
    rows, targets = logits[:, :-1].reshape(-1, classes), labels[:, 1:].reshape(-1)
    total = nn.functional.cross_entropy(rows, targets, ignore_index=IGNORED, reduction="sum")
    try:
        mean = loss(logits=logits, labels=labels, vocab_size=classes)
        share = loss(logits=logits, labels=labels, vocab_size=classes, num_items_in_batch=7)
        return torch.allclose(mean, total / (len(targets) - 1)) and torch.allclose(share, total / 7)
    except MISFITS:
        return False
