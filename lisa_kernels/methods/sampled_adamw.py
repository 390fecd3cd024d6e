"""The optimizer of an attached model: AdamW in 8 bits whose step also folds slots and switches layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lisa_kernels.distributed import GradientReduction, Sharing, at_rest
from lisa_kernels.errors import InputError
from lisa_kernels.layers import (
    FreezeGuard,
    LossWithoutLogits,
    OrderedTables,
    PlainLinears,
    ReadWeights,
    SlotModule,
    WokenLinear,
    leave_out_logits,
)
from lisa_kernels.methods.adapters import Adapters
from lisa_kernels.methods.attachment import attachment_state, check_attachment, take_precisions
from lisa_kernels.methods.definitions import AdapterMethod, Method
from lisa_kernels.methods.foreign_steps import ForeignSteps
from lisa_kernels.methods.gradient_norms import add_norm, mean_norms
from lisa_kernels.methods.groups import parameter_groups
from lisa_kernels.methods.rank_access import RankAccess
from lisa_kernels.methods.shelf import Shelf
from lisa_kernels.methods.slots import (
    fold_slots,
    kept_buffers,
    settle_slots,
    slots_in_shape,
    stagger,
    take_slots_state,
    transport_slots,
)
from lisa_kernels.methods.units import Layout, Unit
from lisa_kernels.optim.paged import PagedStates
from lisa_kernels.paging import Store
from lisa_kernels.paging.page_file import PageFile
from lisa_kernels.samplers import AdaptiveSampler, Sampler


class SampledAdamW(RankAccess):
    """An ordinary torch optimizer over all layers of a model, a few of which train at a time.

    Every parameter that may ever train is in its groups from the start: full-rank matrices, low-rank slots, vectors
    (without weight decay); the number of groups never changes. Layers are switched inside `step()`, every `period`
    calls; a step skipped for a non-finite gradient counts as a call, for the device is not asked. Made by `attach`.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        layout: Layout,
        sampler: Sampler | None,
        *,
        lr: float,
        weight_decay: float,
        keep_logits: bool = False,
        reduction: GradientReduction | None = None,
        sharing: Sharing = Sharing.BY_CALLER,
        **settings: Any,
    ) -> None:
        self.model, self.method, self.layout, self.sampler = model, method, layout, sampler
        self.calls = 0
        self.visits = [0] * len(layout.drawn)
        self.history: list[list[int]] = []
        self._active: list[int] = []
        self._norms: dict[int, Tensor] = {}
        self._guard: FreezeGuard | None = None
        self._join(reduction)
        self._adapters: Adapters | None = None
        if isinstance(method, AdapterMethod):
            beside = {path: layer for path, layer in layout.always.lowrank.items() if layer.tracker is None}
            self._adapters = Adapters(model, method, beside)
        for layer in self._layers().values():
            layer.exact_master = method.get("master", "none") == "remainder"
        retired_state: str = method.get("retired_state", "drop")
        stays = retired_state == "page" and settings.get("paging") == "resident"
        self._retired_state = "keep" if stays else retired_state
        self._unit_numbers: dict[Tensor, int] = {
            param: n for n, unit in enumerate(layout.units()) for param in unit.params()
        }  # fmt: skip
        self._woken: dict[Tensor, WokenLinear] = {
            layer.stored_weight: layer for unit in layout.units() for layer in unit.woken
        }  # fmt: skip
        self._shelf = Shelf(self._open_store)
        super().__init__(self._parameter_groups(lr, weight_decay), lr=lr, weight_decay=weight_decay, **settings)
        self._guard = FreezeGuard(model, sharing)
        self._foreign_steps, self._read_weights = ForeignSteps(self), ReadWeights(model)
        self._plain_linears = PlainLinears(model)
        self._ordered_tables = OrderedTables(model, (param for unit in layout.units() for param in unit.full))
        self._loss: LossWithoutLogits | None = None
        try:
            self._activate_always()
            self._begin_period()
            self._loss = None if keep_logits else leave_out_logits(model)
            if self._loss is not None:
                self._loss.none_is_zero = reduction is not None
        except BaseException:
            self._remove_hooks()
            self._close_pages()
            raise

    def _parameter_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        return parameter_groups(self.method, self.layout, lr, weight_decay)

    def _page_states(self) -> PagedStates | None:
        if self._retired_state == "page" and self.paging is None:
            return self._states_in("host", stay=True)
        return super()._page_states()

    def _open_store(self) -> Store:
        assert self._paged is not None
        return self._paged.open()

    def _identity(self) -> dict[str, Any]:
        return {**super()._identity(), "method": self.method.settings()}

    def _unit_of(self, param: Tensor) -> int:
        return self._unit_numbers[param]

    def _device_of(self, param: Tensor) -> torch.device:
        return self._woken[param].device if param in self._woken else param.device

    @property
    def forms_logits(self) -> bool:
        """Whether the training loss forms the logits of all tokens at once, as the plain model does."""
        return self._loss is None

    @contextmanager
    def evaluation_without_logits(self) -> Iterator[None]:
        """Compute losses in evaluation mode as in training, where that is done without logits."""
        if self._loss is None:
            yield
            return
        self._loss.in_evaluation = True
        try:
            yield
        finally:
            self._loss.in_evaluation = False

    # Which layers train

    @property
    def active_layers(self) -> list[int]:
        """The layers that the next `step()` moves, ascending; embedding and head, where drawn, follow the blocks."""
        return list(self._active)

    @property
    def master_bytes_written(self) -> int:
        """How many bytes of masters went to the disk so far; 0 where they are in host memory."""
        return 0 if self.layout.masters is None else self.layout.masters.bytes_written

    @property
    def code_bytes_written(self) -> int:
        """How many bytes of codes at rest went to a file so far; 0 where they are in none."""
        return 0 if self._code_file is None else self._code_file.bytes_written

    @property
    def code_bytes_read(self) -> int:
        """How many bytes of codes at rest came from a file so far."""
        return 0 if self._code_file is None else self._code_file.bytes_read

    @property
    def _code_file(self) -> PageFile | None:
        return None if self.layout.streamed is None else self.layout.streamed.file

    @property
    def layer_names(self) -> list[str]:
        """The path of each layer that can be drawn."""
        return [unit.name for unit in self.layout.drawn]

    @property
    def period(self) -> int | None:
        """How many calls of `step()` lie between two switches; None if there is no sampler."""
        return self.method.get("period", None) if self.sampler else None

    def _draw(self) -> list[int]:
        if self.sampler is None or self.period is None:
            return list(self.layout.drawable)
        return self._drawn_in(self.calls // self.period)

    def _drawn_in(self, period: int) -> list[int]:
        """Return the layers of a period; the sampler counts those only that can be drawn."""
        assert self.sampler is not None
        return [self.layout.drawable[place] for place in self.sampler.draw(period)]

    def _begin_period(self) -> None:
        drawn = self._draw()
        leaving = self.layout.units_of(index for index in self._active if index not in drawn)
        settle_slots(self, (layer for unit in leaving for layer in unit.lowrank.values()))
        self._switch_to(drawn)
        self.history.append(self.active_layers)

    def _active_units(self) -> list[Unit]:
        return [*self.layout.units_of(self._active), self.layout.always]

    def _active_slots(self) -> list[SlotModule]:
        return [layer for unit in self._active_units() for layer in unit.lowrank.values()]

    def _layers(self) -> dict[str, SlotModule]:
        return {path: layer for unit in self.layout.units() for path, layer in unit.lowrank.items()}

    def _activate_always(self) -> None:
        """Give slots outside the draw their storage (adapters already have it)."""
        for layer in self.layout.always.lowrank.values():
            if not layer.active:
                layer.activate()

    def _switch_to(self, layers: list[int]) -> None:
        """Retire the layers that leave, give those that come their slots, and freeze all others."""
        leaving = self.layout.units_of(index for index in self._active if index not in layers)
        coming = self.layout.units_of(index for index in layers if index not in self._active)
        if self._retired_state == "page":
            # All of them before any is given up: a page that cannot be written stops the run with nothing lost.
            for unit in leaving:
                self._put_away(unit)
        for unit in leaving:
            if self._retired_state == "drop":
                self.retire(unit.params())
            # Their memory is for those that come.
            for param in unit.params():
                param.grad = None
        for unit in leaving:
            for layer in unit.lowrank.values():
                layer.deactivate(keep=self._retired_state == "keep")
            for layer in unit.woken:
                layer.rest()
            unit.rest_lookups(True)
        for unit in coming:
            for layer in unit.woken:
                layer.wake()
            paged = self._shelf.take(unit)
            for path, layer in unit.lowrank.items():
                kept = paged.get(path) or kept_buffers(layer)
                layer.activate(kept.get("basis"), kept.get("remainder"))
                if layer.tracker is not None and "basis" not in kept:
                    layer.tracker.start(self.calls)
                elif layer.tracker is not None:
                    layer.tracker.due = True
            unit.rest_lookups(False)
        self.layout.copies.finish()
        self._active = sorted(layers)
        stagger(self._active_slots())
        self._arm()
        self._norms = {}
        trained = [param for unit in self._active_units() for param in unit.params()]
        if self._guard is not None:
            self._guard.let_move(weight for unit in (*leaving, *coming) for weight in unit.masters())
            self._guard.set_trainable(self.model, trained)
        self._average_gradients_of(trained)

    def _put_away(self, unit: Unit) -> None:
        """Write what a unit that rests needs at its return to the store."""
        self._shelf.put(unit, {path: kept_buffers(layer) for path, layer in unit.lowrank.items()})
        if self._paged is not None and self._paged.stay:
            self._paged.put_away(self.state, unit.params())

    def _prefetch_coming(self) -> None:
        """Begin to bring back what the switch at the end of this step will need, beside the step's own work."""
        if self._retired_state != "page" or self._paged is None:
            return
        for unit in self._coming():
            self._shelf.prefetch(unit)
            if self._paged.stay:
                self._paged.prefetch(unit.params())

    def _coming(self) -> list[Unit]:
        """Return what this step's end will switch on, where that is known before."""
        if self.sampler is None or self.period is None or (self.calls + 1) % self.period:
            return []
        # What an adaptive sampler draws next depends on this very step.
        if isinstance(self.sampler, AdaptiveSampler):
            return []
        drawn = self._drawn_in((self.calls + 1) // self.period)
        return self.layout.units_of(index for index in drawn if index not in self._active)

    def _arm(self) -> None:
        for unit in self._active_units():
            unit.arm()

    # The step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update the active layers, fold their slots, and switch layers when the period is over."""
        if self._guard is None:
            raise InputError("this optimizer was detached; attach the model again to train on.")
        self._check_unmerged()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._share_gradients()
        self._read_weights.end_pass()
        self._guard.check_unchanged(self.model)
        self._guard.enforce(self.model)
        if isinstance(self.sampler, AdaptiveSampler):
            self._note_gradient_norms()
        self._prefetch_coming()
        active = self._active_slots()
        stepped = any(param.grad is not None for unit in self._active_units() for param in unit.params())
        self._take_step()
        if not stepped:
            return loss
        fold_slots(self, [layer for layer in active if layer.slot.grad is not None])
        for layer in active:
            if layer.tracker is not None:
                layer.tracker.advance()
        # A basis is found beside a slot of zeros.
        settle_slots(self, (layer for layer in active if layer.tracker is not None and layer.tracker.due))
        self._arm()
        self._count()
        return loss

    def _before_update(self) -> None:
        transport_slots(self, self._active_slots(), self._last_skip)

    def _note_gradient_norms(self) -> None:
        """Add each active layer's gradient norm to its (sum, count) of this period; only finite ones count."""
        for index in self._active:
            grads = [param.grad for param in self.layout.drawn[index].params() if param.grad is not None]
            if grads:
                self._norms[index] = add_norm(self._norms.get(index), grads, self._unscaling(grads[0].device))

    def _count(self) -> None:
        for index in self._active:
            self.visits[index] += 1
        self._set_calls(self.calls + 1)
        sampler = self.sampler if self.period is not None and self.calls % self.period == 0 else None
        self._compare_trained(self._active_units(), leaving=sampler is not None)
        if sampler is not None:
            self._tell_sampler(sampler)
            self._begin_period()

    def _tell_sampler(self, sampler: Sampler) -> None:
        """Let the sampler know each layer's mean gradient norm in this period; the host waits for all of them once."""
        norms = mean_norms(self._norms)
        sampler.observe({self.layout.drawable.index(index): norm for index, norm in norms.items()})

    # Checkpoints

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse copies and pickles: they would step a model that is not theirs, or none."""
        raise InputError(
            "the optimizer of an attached model cannot be copied or pickled; save its state_dict() beside the model's, "
            "and load both into a model that is attached alike."
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer's state together with sampler, active layers, bases and adapters.

        Adapters come with the weights beneath them, those of the model and no copies; what is saved is larger by them.
        """
        self._check_unmerged()
        at_rest(self.model)
        return {**super().state_dict(), "attachment": attachment_state(self)}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where `state_dict()` was taken, with its seed.

        Refuses another method's or another model's state before it changes anything.
        """
        saved = state_dict.get("attachment")
        if saved is None:
            raise InputError("this state is not of an attached model (it has no 'attachment'); load it into AdamW8bit.")
        if self._guard is None:
            raise InputError("this optimizer was detached; attach the model again to load a state.")
        self._check_unmerged()
        at_rest(self.model)
        sampler = check_attachment(self, saved)
        layers = self._layers()
        with slots_in_shape(layers.values()):
            self._check_loadable(state_dict)
        take_precisions(self, saved)
        self.sampler, self.seed = sampler, saved["seed"]
        self._switch_to(list(saved["active_layers"]))
        with slots_in_shape(layers.values()):
            super().load_state_dict(state_dict)
        self._set_calls(saved["calls"])
        self.visits = list(saved["visits"])
        self.history = [list(row) for row in saved["history"]]
        devices = {int(index): self.layout.drawn[int(index)].params()[0].device for index in saved["norms"]}
        self._norms = {int(index): seen.to(devices[int(index)], copy=True) for index, seen in saved["norms"].items()}
        for layer in layers.values():
            if layer.tracker is not None:
                layer.tracker.seed = self.seed
        self._take_units(saved["slots"])
        self._arm()

    def _take_units(self, slots: dict[str, Any]) -> None:
        """Take over what slots had, unit by unit: the device never holds what is to rest elsewhere."""
        active = {unit.name for unit in self._active_units()}
        for unit in self.layout.units():
            self._shelf.forget(unit)
            take_slots_state(unit.lowrank, slots)
            if self._retired_state == "page" and unit.name not in active:
                self._shelf.put(unit, {path: kept_buffers(layer) for path, layer in unit.lowrank.items()})
                for layer in unit.lowrank.values():
                    layer.deactivate()

    # The end

    def _remove_hooks(self) -> None:
        assert self._guard is not None
        self._leave_ranks()
        self._guard.remove(self.model)
        self._foreign_steps.remove()
        self._read_weights.remove()
        self._plain_linears.remove()
        self._ordered_tables.remove()
        if self._loss is not None:
            self._loss.remove()

    def _close_pages(self) -> None:
        for unit in self.layout.units():
            self._shelf.forget(unit)
        if self._paged is not None:
            self._paged.close()

    @torch.no_grad()
    def detach(self) -> nn.Module:
        """Merge adapters, put plain layers back with `requires_grad` as it was, free the state; returns the model."""
        if self._guard is None:
            return self.model
        if self._adapters is not None:
            self._adapters.merge_for_good()
        # To nearest, as what was saved before was rounded.
        settle_slots(self, self._layers().values(), last=True)
        self._remove_hooks()
        for layer in self._woken.values():
            layer.go_home()
        self.layout.copies.finish()
        for swap in self.layout.swaps:
            swap.layer.deactivate()
            swap.undo()
        for group in self.param_groups:
            self.retire(group["params"])
        self._close_pages()
        if self.layout.masters is not None:
            self.layout.masters.close()
        if self.layout.streamed is not None:
            self.layout.streamed.close()
        self._guard = None
        self._active = []
        return self.model
