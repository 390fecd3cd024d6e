"""The probe tells the losses that can do without logits from those that cannot, whatever the model's weights hide."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import DECODERS, llama
from torch import Tensor, nn

from lisa_kernels.layers import leave_out_logits
from lisa_kernels.layers.loss_probe import fitted_curve, is_plain_loss
from lisa_kernels.ops.linear_cross_entropy import Curve


@pytest.mark.parametrize("curve", [Curve(), Curve(0.125), Curve(3.0), Curve(cap=15.0), Curve(2.0, 50.0)], ids=str)
@pytest.mark.parametrize("rounding", [1e-3, 2e-2], ids=str)
def test_curves_are_found_among_the_models_numbers(curve: Curve, rounding: float) -> None:
    """Whatever the model's arithmetic rounds; numbers that are not the model's, and other functions, are none."""
    row = torch.randn(500, generator=torch.Generator().manual_seed(0))
    plain = torch.stack([0.1 * row / row.abs().max(), 100.0 * row / row.abs().max()])
    noise = 1.0 + (torch.rand(2, 500, generator=torch.Generator().manual_seed(1)) - 0.5) * rounding
    found = curve.bend_(plain.clone()) * noise
    assert fitted_curve(plain, found, [1.0, 2.0, 3.0, 8.0, 15.0, 32.0, 50.0], rounding) == curve
    if curve != Curve():
        assert fitted_curve(plain, found, [1.0, 4.0, 5.5, 20.0], rounding) is None
    assert fitted_curve(plain, found.abs(), [1.0, 2.0, 3.0, 8.0, 15.0, 32.0, 50.0], rounding) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", DECODERS)
def test_the_probe_knows_16_bit_rounding(name: str, dtype: torch.dtype) -> None:
    """Models in 16 bits are taken over as in 32, and a cap is found as it is in the configuration."""
    without = leave_out_logits(DECODERS[name].make().to(dtype))
    assert without is not None
    assert without.curve == (Curve(cap=30.0) if name == "gemma2" else Curve())


@pytest.mark.parametrize("change", ["scaled", "capped", "added"])
def test_a_model_that_changes_its_logits_is_found(change: str) -> None:
    """Negative control of the probe: small random weights hide a cap or a scale from a plain comparison of losses."""

    class Changed(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            logits = self.inner(x)
            if change == "scaled":
                return logits * 0.9
            return 30 * torch.tanh(logits / 30) if change == "capped" else logits + 1e-3 * logits**2

        @property
        def weight(self) -> Any:
            return self.inner.weight

    model = llama()
    own = model.lm_head
    # What follows the layer is not the layer's: the model still names its linear as the output layer.
    model.lm_head = Changed(own)
    model.get_output_embeddings = lambda: own
    assert leave_out_logits(model) is None
    model = llama()
    assert leave_out_logits(model) is not None


def test_a_loss_of_the_users_own_is_kept() -> None:
    """A loss function that is not the plain cross entropy is found before any forward."""
    model = llama()
    own = model.loss_function

    def smoothed(logits: Tensor, labels: Tensor, vocab_size: int, **kwargs: Any) -> Tensor:
        return own(logits, labels, vocab_size, **kwargs) + 0.01 * logits.square().mean()

    assert is_plain_loss(own, 7)
    assert not is_plain_loss(smoothed, 7)
    model.loss_function = smoothed
    assert leave_out_logits(model) is None
    assert model.loss_function is smoothed
