"""The size of gradients on CPUs in C++: one pass at the memory's speed."""

from __future__ import annotations

import torch
from torch import Tensor

from lisa_kernels.native import DTYPE_CODES, Library, addresses, counts, dtype_codes, table


def grad_norm(library: Library, grads: list[Tensor], squares: bool) -> Tensor:
    """Return float64 [2], the largest magnitude and the sum of squares; the contract is the package's.

    Sums are formed per span of 65,536 elements and added in order, so that they do not depend on the threads.
    """
    result = torch.empty(2, dtype=torch.float64)
    rows = table(addresses("a gradient", grads, DTYPE_CODES), counts(grads), dtype_codes(grads))
    library.call("grad_norm", rows.ctypes.data, len(grads), squares, result.data_ptr())
    return result
