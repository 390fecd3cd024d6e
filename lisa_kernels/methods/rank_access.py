"""What an attached model's optimizer does where several ranks train the model together."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn

from lisa_kernels.distributed import GradientReduction, check_sent, gradients_at_home, is_sharded
from lisa_kernels.methods.adapter_access import AdapterAccess
from lisa_kernels.methods.shared_folder import load_shards, save_shards
from lisa_kernels.methods.units import Unit

# Between two comparisons of weights that train all the time.
COMPARED_STEPS = 100
# Between two comparisons at all: each reads what trained several times over.
LEAST_STEPS = 10


class RankAccess(AdapterAccess):
    """The part of `SampledAdamW` that ranks share; alone, each call does nothing.

    _reduction: None of a model that trains in one process.
    """

    model: nn.Module
    calls: int
    _reduction: GradientReduction | None
    _compared_at = -LEAST_STEPS

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Let the gradients of backwards inside add up on each rank, as DDP's `no_sync` does.

        For all micro-batches of a step but the last, whose backward averages them. A basis that is due is found with
        the other ranks all the same.
        """
        if self._reduction is None:
            yield
            return
        with self._reduction.no_sync(), gradients_at_home(self.model):
            yield

    def save_shards(self, folder: str | os.PathLike[str]) -> None:
        """Write model and optimizer into a folder, each rank its own shards, by torch.distributed.checkpoint.

        Every rank calls it; they need a disk that all of them see. An earlier folder is replaced when all is written.
        """
        save_shards(Path(folder), self.model, self)  # type: ignore[arg-type]

    def load_shards(self, folder: str | os.PathLike[str]) -> None:
        """Continue where `save_shards` was called, on any number of ranks: the model is attached alike, sharded or not.

        Every rank calls it.
        """
        load_shards(Path(folder), self.model, self)  # type: ignore[arg-type]

    def _join(self, reduction: GradientReduction | None) -> None:
        """Train with other ranks from now on."""
        self._reduction = reduction
        if reduction is not None:
            self._share_bases()

    def _leave_ranks(self) -> None:
        if self._reduction is not None:
            self._reduction.remove()

    def _average_gradients_of(self, params: list[nn.Parameter]) -> None:
        """Average the gradients of these parameters, and of no others, in every backward."""
        if self._reduction is not None:
            # FSDP averages those that are shared out.
            self._reduction.follow(param for param in params if not is_sharded(param))

    def _share_gradients(self) -> None:
        """See to it that the step that begins uses gradients that all ranks share."""
        if self._reduction is not None:
            check_sent(self.model)
            self._reduction.before_step()

    def _share_bases(self) -> None:
        """Have the bases of all layers found from the sums of all ranks' gradients, on devices of one kind by each."""
        assert self._reduction is not None
        ranks = self._reduction.ranks
        for unit in self.layout.units():
            for path, layer in unit.lowrank.items():
                if layer.tracker is not None:
                    layer.tracker.summed = functools.partial(self._sum_sketch, path)
                    layer.tracker.of_first = ranks.take_first_ if ranks.mixed else None

    def _set_calls(self, calls: int) -> None:
        """Set how often the optimizer has stepped, for itself and for what ranks tell each other."""
        self.calls = calls
        if self._reduction is not None:
            self._reduction.step = calls

    def _sum_sketch(self, path: str, sketch: Tensor) -> Tensor:
        assert self._reduction is not None
        self._reduction.ranks.meet(f"finds the basis of {path} in step {self._reduction.step}")
        return self._reduction.ranks.sum_(sketch)

    def _compare_trained(self, units: list[Unit], leaving: bool) -> None:
        """Raise InputError on all ranks unless what these units trained is the same on each.

        At the end of a period, where units leave, but of very short ones not of each; and every `COMPARED_STEPS`, for
        some methods have no periods.
        """
        long_ago = self.calls - self._compared_at >= LEAST_STEPS
        if self._reduction is None or not ((leaving and long_ago) or self.calls % COMPARED_STEPS == 0):
            return
        self._compared_at = self.calls
        names = {param: name for name, param in self.model.named_parameters()}
        trained: dict[str, Tensor] = {}
        trained |= {names[param]: param for unit in units for param in unit.full if not is_sharded(param)}
        for path, layer in ((path, layer) for unit in units for path, layer in unit.lowrank.items()):
            if layer.tracker is None:
                trained |= {names[param]: param for param in layer.trained}
            elif is_sharded(layer.stored_weight):
                # Each rank has other rows, and all of them what these were stepped by.
                trained[f"the basis of {path}"] = layer.basis
            else:
                trained[names[layer.stored_weight]] = layer.stored_weight
        step = self._reduction.step
        self._reduction.ranks.meet(f"compares weights after step {step}")
        self._reduction.ranks.check_equal(trained, f"after step {step}")
