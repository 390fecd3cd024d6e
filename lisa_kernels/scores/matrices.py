"""The weight matrices of a decoder block, found by structure and read a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from lisa_kernels.distributed import whole
from lisa_kernels.errors import InputError

# One chunk upcast to fp32 takes 64 MiB.
_CHUNK_ELEMENTS = 1 << 24


def check_blocks(blocks: Sequence[nn.Module]) -> None:
    """Raise `InputError` unless there are blocks and their parameters hold numbers that can be read."""
    if not blocks:
        raise InputError("no decoder block was given to score: at least one is needed.")
    for index, block in enumerate(blocks):
        for name, parameter in block.named_parameters():
            if parameter.is_meta:
                raise InputError(f"{name!r} of block {index} is on the meta device: load the weights before scoring.")
            if not parameter.is_floating_point():
                raise InputError(
                    f"{name!r} of block {index} holds {parameter.dtype}: scores need weights in a floating dtype, "
                    f"so load the model without quantisation."
                )


def block_linears(block: nn.Module) -> dict[nn.Module, Tensor]:
    """Return each linear module of the block with its weight as [out features, in features], not copied.

    Linears are `nn.Linear`, its subclasses, and modules of the shape of transformers' `Conv1D`: a matrix of
    [in features, out features] beside an attribute `nf` that gives the out features, or `transposed` that says it.
    """
    found: dict[nn.Module, Tensor] = {}
    for module in block.modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim != 2:
            continue
        if getattr(module, "nf", None) == weight.shape[1] or getattr(module, "transposed", False):
            found[module] = weight.detach().t()
        elif isinstance(module, nn.Linear):
            found[module] = weight.detach()
    return found


def block_matrices(block: nn.Module) -> dict[str, Tensor]:
    """Return the block's weight matrices by name; a 3-D parameter (fused experts) counts as a stack of matrices."""
    matrices: dict[str, Tensor] = {}
    for name, parameter in block.named_parameters():
        if parameter.ndim == 2:
            matrices[name] = parameter.detach()
        elif parameter.ndim == 3:
            matrices.update({f"{name}[{i}]": matrix for i, matrix in enumerate(whole(parameter.detach()))})
    return matrices


def fp32_rows(matrix: Tensor) -> Iterator[Tensor]:
    """Yield the rows of a matrix [m, n] in fp32, some at a time; what is yielded may be the matrix's own memory.

    One that ranks share out is gathered meanwhile.
    """
    matrix = whole(matrix)
    for rows in matrix.split(max(1, _CHUNK_ELEMENTS // max(1, matrix.shape[1]))):
        yield rows.float()
