"""A model and its optimizer in a folder that all ranks write together and any number of ranks reads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lisa_kernels.distributed import at_rest, read_state, read_tensors, write_together

if TYPE_CHECKING:
    from lisa_kernels.methods.sampled_adamw import SampledAdamW


def save_shards(folder: Path, model: nn.Module, optimizer: SampledAdamW) -> None:
    """Write a model and its optimizer's state; every rank calls it."""
    at_rest(model)
    write_together(folder, model.state_dict(), optimizer.state_dict())


def load_shards(folder: Path, model: nn.Module, optimizer: SampledAdamW) -> None:
    """Take over what `save_shards` wrote, on any number of ranks, whose models are sharded or whole.

    Raises InputError for a folder that it did not write, or of another method.
    """
    at_rest(model)
    state = read_state(folder)
    # Of all ranks, not of the one that wrote the rest.
    state["format"].pop("shards", None)
    params = {str(number): param for number, param in optimizer._saved_params(state).items()}
    layers = optimizer._layers()

    def like(path: tuple[Any, ...]) -> Tensor:
        # Of a state's number or a layer's path.
        return params[str(path[1])] if path[0] == "state" else layers[path[2]].stored_weight

    weights = model.state_dict()
    state = read_tensors(folder, weights, state, like)
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
