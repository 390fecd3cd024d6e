"""What a card computes in hardware decides the dtype of weights; one that is too old is refused in one sentence."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lisa_kernels.errors import InputError
from lisa_kernels.ops import capability, tiles
from lisa_kernels.ops.capability import auto_dtype, check_capability, check_dtype
from lisa_kernels.ops.lowrank_linear import products

CUDA = torch.device("cuda", 0)


@pytest.fixture
def card(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, int]]:
    """Let a CUDA device of this capability be there, in which bfloat16 is emulated."""
    version: tuple[int, int] = request.param
    capability.capability.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: version)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(torch.version, "hip", None)
    yield version
    capability.capability.cache_clear()


@pytest.mark.parametrize("card", [(7, 0), (7, 5)], indirect=True, ids=str)
def test_a_card_that_emulates_bfloat16_takes_float16(card: tuple[int, int]) -> None:
    assert auto_dtype(CUDA) == torch.float16
    check_dtype(torch.float16, CUDA)
    check_dtype(torch.float32, CUDA)
    with pytest.raises(InputError, match=rf"bf16.*a card has compute capability {card[0]}\.{card[1]}.*use fp16"):
        check_dtype(torch.bfloat16, CUDA)


@pytest.mark.parametrize("card", [(8, 0), (8, 6), (12, 0)], indirect=True, ids=str)
def test_a_card_that_multiplies_bfloat16_takes_it(card: tuple[int, int]) -> None:
    assert auto_dtype(CUDA) == torch.bfloat16
    check_dtype(torch.bfloat16, CUDA)


@pytest.mark.parametrize("card", [(6, 1)], indirect=True, ids=str)
def test_a_card_that_kernels_are_not_made_for_is_refused(card: tuple[int, int]) -> None:
    words = r"a card has compute capability 6\.1; kernels need 7\.0"
    for refused in (lambda: check_capability(CUDA), lambda: check_dtype(torch.float32, CUDA), lambda: warp_of(CUDA)):
        with pytest.raises(InputError, match=words):
            refused()


def warp_of(device: torch.device) -> int:
    """Ask what every launch asks."""
    return tiles.warp_size.__wrapped__(device)


def test_cpus_take_float32_and_refuse_nothing() -> None:
    cpu = torch.device("cpu")
    assert auto_dtype(cpu) == torch.float32
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        check_dtype(dtype, cpu)


class OnCuda:
    """What `sum_of_outer_products` asks of a tensor before it chooses a route."""

    device, is_meta = CUDA, False

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


@pytest.mark.parametrize(
    ("card", "dtype", "wanted"),
    [((7, 5), torch.bfloat16, False), ((7, 5), torch.float16, True), ((8, 0), torch.bfloat16, True),
     ((8, 0), torch.float32, False)],
    indirect=["card"], ids=str,
)  # fmt: skip
def test_16_bits_are_multiplied_into_float32_where_torch_does(
    card: tuple[int, int], dtype: torch.dtype, wanted: bool
) -> None:
    """torch refuses bfloat16 operands with a float32 result below 8.0."""
    tensor: Tensor = OnCuda(dtype)  # type: ignore[assignment]
    assert products._multiplies_into_float32(tensor) is wanted
