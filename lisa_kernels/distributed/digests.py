"""A number for each tensor that tells its bits from others, so that ranks can compare what they hold."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

# Elements that are looked at together: eight bytes each.
PORTION = 1 << 20
# Odd, so that no change of one element is lost modulo 2⁶⁴; the golden ratio spreads what places it multiplies.
SPREAD = 0x9E3779B97F4A7C15 - (1 << 64)
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def digest(tensor: Tensor) -> Tensor:
    """Return int64 0-d on the tensor's device: Σ bits · odd factor of the place, modulo 2⁶⁴.

    It differs wherever one element does, and but for a chance of about 2⁻⁶⁴ where several do. The order of a sum does
    not matter to integers: every device gives the same.
    """
    bits = tensor.detach().contiguous().view(-1).view(INTEGERS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, len(bits), PORTION):
        part = bits[start : start + PORTION].to(torch.int64)
        places = torch.arange(start, start + len(part), dtype=torch.int64, device=tensor.device)
        total += part.mul_(places.mul_(SPREAD).bitwise_or_(1)).sum()
    return total


def digests(tensors: Iterable[Tensor]) -> Tensor:
    """Return int64 [n] on the CPU, one for each tensor; waits for the devices once."""
    each = [digest(tensor) for tensor in tensors]
    return torch.stack([one.to(each[0].device) for one in each]).cpu() if each else torch.empty(0, dtype=torch.int64)
