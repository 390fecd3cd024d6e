"""The size of gradients on CPUs in C++: one pass at the memory's speed."""

from __future__ import annotations

import torch
from torch import Tensor

from lisa_kernels.native import Library, counts, float_addresses, table


def grad_norm(library: Library, grads: list[Tensor], squares: bool) -> Tensor:
    """Return float64 [2], the largest magnitude and the sum of squares; the contract is the package's.

    Sums are formed per span of 65,536 elements and added in order, so that they do not depend on the threads.
    """
    result = torch.empty(2, dtype=torch.float64)
    gradients, dtypes = float_addresses("a gradient", grads)
    _rows, where = table(gradients, counts(grads), dtypes)
    library.call("grad_norm", where, len(grads), squares, result.data_ptr())
    return result
