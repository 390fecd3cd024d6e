"""The optimizer of a model whose groups of layers train in turn, each on its own interval of time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lisa_kernels.errors import InputError
from lisa_kernels.flow.resting import RestingWeights
from lisa_kernels.flow.route import Route
from lisa_kernels.flow.routing import route_model, router_of, unroute_model
from lisa_kernels.methods import SampledAdamW
from lisa_kernels.methods.units import Layout
from lisa_kernels.ops.tiles import to_device
from lisa_kernels.paging import Store, open_store
from lisa_kernels.samplers import Sampler

if TYPE_CHECKING:
    from lisa_kernels.flow.experts import TimestepExperts


class ExpertsAdamW(SampledAdamW):
    """`SampledAdamW` over groups of blocks: the group that trains is the one that runs, and times are drawn for it.

    Made by `attach(model, TimestepExperts(...))`. The model runs by its route, also after `detach()`: in training the
    active group's blocks, in evaluation those of the times it is given. What is no one block's has parameter groups of
    its own ("shared", "shared vectors") and steps each time, a group of blocks every `groups`-th period.
    """

    method: TimestepExperts

    def __init__(
        self, model: nn.Module, method: TimestepExperts, layout: Layout, sampler: Sampler | None, *,
        keep_logits: bool = False, paging: str | None = None, **settings: Any,
    ) -> None:  # fmt: skip
        if len(layout.drawable) != len(layout.drawn):
            frozen = next(unit for number, unit in enumerate(layout.drawn) if number not in layout.drawable)
            raise InputError(
                f"{frozen.name} is frozen whole (requires_grad=False), and every block is part of a group that trains; "
                "unfreeze it, or leave it out of the list of blocks."
            )
        if method.resting_weights == "page" and paging == "resident":
            raise InputError(
                'resting_weights="page" moves weights off the device, and paging="resident" keeps everything there; '
                'use paging=None, "host" or "file:DIR".'
            )
        self._weights_store: Store | None = None
        self._times_drawn = 0
        routed_before = router_of(model) is not None
        self._router = route_model(
            model, method.intervals(), layout.drawn[0].name.rpartition(".")[0], method.clock
        )  # fmt: skip
        self._weights: RestingWeights | None = None
        if method.resting_weights == "page":
            self._weights = RestingWeights(model, layout.drawn, self._open_store)
        try:
            super().__init__(model, method, layout, sampler, keep_logits=True, paging=paging, **settings)
        except BaseException:
            self._end_routing()
            if not routed_before:
                unroute_model(model)
            raise
        self._router.before_run = self._have_weights

    def _parameter_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        blocks = [param for unit in self.layout.drawn for param in unit.full]
        shared = self.layout.always.full
        rate = lr * self.method.shared_rate
        groups: list[dict[str, Any]] = [
            {"params": [param for param in blocks if param.dim() >= 2], "name": "matrices"},
            {"params": [param for param in blocks if param.dim() < 2], "weight_decay": 0.0, "name": "vectors"},
            {"params": [param for param in shared if param.dim() >= 2], "lr": rate, "name": "shared"},
            {
                "params": [param for param in shared if param.dim() < 2], "lr": rate, "weight_decay": 0.0,
                "name": "shared vectors",
            },
        ]  # fmt: skip
        return [group for group in groups if group["params"]]

    # Groups and times

    @property
    def route(self) -> Route:
        """Which blocks run."""
        return self._router.route

    @property
    def active_group(self) -> int:
        """The group that the next `step()` moves, and that runs in training until then."""
        return self.route.group_of_block(self._active[0])

    @property
    def group_steps(self) -> list[int]:
        """How many steps each group has taken.

        A schedule goes by them: `LambdaLR(opt, lambda _: share_of(opt.group_steps[opt.active_group]))`.
        """
        return [self.visits[self.route.blocks_of(group).start] for group in range(self.route.groups)]

    def times(self, batch_size: int) -> Tensor:
        """Return float32 [batch_size], times of the active group's interval, on the model's device.

        They depend on the seed, the step, how often they were asked for in it, and on the rank where several train; the
        model is told `method.clock.of(times)` where its clock is another.
        """
        if self._guard is None:
            raise InputError("this optimizer was detached; attach the model again to train on.")
        ranks = None if self._reduction is None else self._reduction.ranks
        call = self._times_drawn if ranks is None else self._times_drawn * ranks.count + ranks.rank
        drawn = self.route.intervals.draw(self.active_group, batch_size, seed=self.seed, step=self.calls, call=call)
        self._times_drawn += 1
        return to_device(drawn, self.layout.drawn[self._active[0]].full[0].device)

    def _begin_period(self) -> None:
        # The order of the groups is known: of draws there is nothing to remember.
        self._switch_to(self._draw())
        # Moments are needed at the end of the next step, not at its start: they come beside its forward and backward,
        # and two groups' are never there at once.
        if self._paged is not None and self._paged.stay:
            for index in self._active:
                self._paged.prefetch(self.layout.drawn[index].params())

    def _count(self) -> None:
        self._times_drawn = 0
        super()._count()

    # Weights at rest

    def _open_store(self) -> Store:
        if self._paged is not None:
            return self._paged.open()
        if self._weights_store is None:
            self._weights_store = open_store(self.paging or "host", self._identity())
        return self._weights_store

    def _switch_to(self, layers: list[int]) -> None:
        super()._switch_to(layers)
        self.route.active = self.active_group
        if self._weights is not None:
            self._weights.keep_only(layers)

    def _prefetch_coming(self) -> None:
        """Begin to bring back the weights that the next forward starts with, beside this step's work."""
        if self._weights is not None:
            for unit in self._coming():
                self._weights.prefetch(unit)

    @torch.no_grad()
    def _have_weights(self, group: int) -> None:
        """Have the weights of a group that runs in evaluation, beside those of the group that trains."""
        if self._weights is not None:
            self._weights.keep_only([*self._active, *self.route.blocks_of(group)])

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where `state_dict()` was taken, with its seed."""
        super().load_state_dict(state_dict)
        self._times_drawn = 0

    # The end

    def _end_routing(self) -> None:
        self._router.before_run = None
        self.route.active = None
        if self._weights is not None:
            self._weights.end()

    def _close_pages(self) -> None:
        self._end_routing()
        super()._close_pages()
        if self._weights_store is not None:
            self._weights_store.close()
            self._weights_store = None
