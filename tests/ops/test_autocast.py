"""What autocast asks of operations, on devices that know it and on the one that does not."""

from __future__ import annotations

import torch

from lisa_kernels.ops.autocast import autocast_dtype, no_autocast


def test_the_dtype_is_that_of_the_context() -> None:
    """None outside, the context's dtype inside, None again where it is switched off inside."""
    assert autocast_dtype("cpu") is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert autocast_dtype("cpu") is torch.bfloat16
        with no_autocast("cpu"):
            assert autocast_dtype("cpu") is None
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.float32
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.bfloat16


def test_tensors_without_values_know_no_autocast() -> None:
    """torch raises when it is asked about the meta device; plans run there."""
    assert autocast_dtype("meta") is None
    with no_autocast("meta"):
        assert (torch.ones(2, 2, device="meta") @ torch.ones(2, 2, device="meta")).dtype is torch.float32
