"""Which operations of a computation add floats in an order that a GPU chooses anew each time, seen without a GPU."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# From the documentation of `torch.use_deterministic_algorithms`, for CUDA; those that only read are left out.
ATOMIC = {
    "index_add", "index_add_", "scatter_add", "scatter_add_", "scatter_reduce", "scatter_reduce_", "put", "put_",
    "index_reduce", "index_reduce_", "bincount", "histc", "cumsum", "cumsum_", "embedding_bag", "_embedding_bag",
}  # fmt: skip


class AtomicAdds(TorchDispatchMode):
    """Notes (operation, shape of what it changes or returns) of each operation that adds floats with atomics."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[str, tuple[int, ...]]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if name in ATOMIC and isinstance(result, Tensor) and result.is_floating_point() and not _distinct(name, args):
            self.seen.add((name, tuple(result.shape)))
        return result


def _distinct(name: str, args: Any) -> bool:
    """Return whether every place is added to once, as the one of each row that `scatter_add_` is given."""
    return name.startswith("scatter") and bool(args[2].shape[args[1]] == 1)
