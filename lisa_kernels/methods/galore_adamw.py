"""GaLore's optimizer: AdamW in 8 bits on projections of full gradients, group by group."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lisa_kernels.errors import InputError
from lisa_kernels.methods.projection import (
    DEFAULTS,
    Projection,
    check_matrices,
    check_settings,
    is_projected,
    stagger,
)
from lisa_kernels.methods.slots import Decays
from lisa_kernels.ops.fold import fold_
from lisa_kernels.optim import AdamW8bit
from lisa_kernels.optim.batches import gather, with_gradients

# Elements of all projected gradients that are held at a time, with as many of their updates: 64 MiB each.
PORTION_ELEMENTS = 1 << 24


class _Moving(NamedTuple):
    """A projected matrix that a step moves."""

    group: dict[str, Any]
    param: Tensor
    grad: Tensor
    projection: Projection


class GaLoreAdamW8bit(AdamW8bit):
    """`AdamW8bit` that steps projected gradients where a group has a `rank`: a drop-in for galore-torch's optimizers.

    Such a group holds matrices [m, n] only. Of its keys `update_proj_gap` defaults to 200, `scale` to 0.25 and
    `proj_type` to "std": with basis vectors along the smaller side, which "reverse_std" puts along the longer; "right"
    takes them of length n, "left" of length m, "full" both. `scale` multiplies the update and not the decay, which
    stays lr · weight_decay. Groups without a rank train as `AdamW8bit`'s. `max_grad_norm` clips by the norm of the full
    gradients; a magnitude above 1e14 in them skips the step.

    Bytes per matrix: 2.03 for each element of the projected gradient (r · max(m, n) for "std"; 8 below 4,096 of them),
    and the basis (r · min(m, n)) in the weight's dtype. A step holds up to 128 MiB of projected gradients and their
    updates at a time, a refresh one gradient in float32.

    A matrix's first gradient that is not zero gives it its basis, and that step alone waits for the device. Every
    `update_proj_gap` steps a warm power iteration refreshes the basis and the moments are carried along, at different
    steps for different matrices. A skipped step leaves weights, moments and bases as they are, and counts towards the
    gap. `load_state_dict` takes over `scale` and `update_proj_gap` as it does lr, and refuses another `rank` or
    `proj_type`.

    Source: arXiv 2403.03507.
    """

    # Projections of matrices of up to 1e10 elements are below the limit of AdamW8bit then.
    _largest_gradient = 1e14

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 1e-2, *, block_size: int = 256, rounding: str = "stochastic", seed: int = 0,
        max_grad_norm: float | None = None,
    ) -> None:  # fmt: skip
        self._projections: dict[Tensor, Projection] = {}
        super().__init__(
            params, lr, betas, eps, weight_decay, block_size=block_size, rounding=rounding, seed=seed,
            max_grad_norm=max_grad_norm,
        )  # fmt: skip

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a pickle needs."""
        return {**super().__getstate__(), "_projections": self._projections}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, projected if it has a `rank`; InputError where that cannot be."""
        super().add_param_group(param_group)
        self._follow(self.param_groups[-1])

    def _check_params(self, group: dict[str, Any]) -> None:
        super()._check_params(group)
        check_settings(group)
        if is_projected(group):
            check_matrices(group)

    def _follow(self, group: dict[str, Any]) -> None:
        """Begin the projections of a group, with defaults for what it does not say."""
        if is_projected(group):
            for name, value in DEFAULTS.items():
                group.setdefault(name, value)
            self._projections.update({param: Projection(param.shape, group) for param in group["params"]})
            stagger(self._projections.values(), self.seed)

    # State

    def _moment_shape(self, param: Tensor) -> torch.Size:
        projection = self._projections.get(param)
        return param.shape if projection is None else projection.slot_shape

    def _new_state(self, param: Tensor, device: torch.device | None = None) -> dict[str, Tensor]:
        state = super()._new_state(param, device)
        projection = self._projections.get(param)
        return state if projection is None else {**state, **projection.new_bases(param.dtype, state["step"].device)}

    def state_dict(self) -> dict[str, Any]:
        """Return the state as `AdamW8bit` does, with the bases, and where each one's schedule stands."""
        packed = super().state_dict()
        packed["projections"] = {
            self.index_of(param): {side: tracker.state_dict() for side, tracker in projection.trackers.items()}
            for param, projection in self._projections.items()
        }
        return packed

    def _check_loadable(self, state_dict: dict[str, Any]) -> None:
        for ours, theirs in zip(self.param_groups, state_dict["param_groups"]):
            check_settings(theirs)
            for name in ("rank", "proj_type"):
                if theirs.get(name) != ours.get(name):
                    raise InputError(
                        f"the state was saved with {name}={theirs.get(name)!r}; this optimizer has {ours.get(name)!r}."
                    )
        super()._check_loadable(state_dict)
        params = self._saved_params(state_dict)
        given = {str(number): sorted(sides) for number, sides in state_dict.get("projections", {}).items()}
        wanted = {
            number: sorted(self._projections[param].sides)
            for number, param in params.items() if param in self._projections
        }  # fmt: skip
        if given != wanted:
            raise InputError(
                f"the state tells of the bases of the parameters {sorted(given)}; this optimizer projects "
                f"{sorted(wanted)}: save the state with this class."
            )

    def _take_state(self, state_dict: dict[str, Any]) -> None:
        super()._take_state(state_dict)
        for group in self.param_groups:
            self._follow(group)
        params = self._saved_params(state_dict)
        for number, trackers in state_dict["projections"].items():
            for side, tracker in self._projections[params[str(number)]].trackers.items():
                tracker.load_state_dict(trackers[side])

    # The step

    @torch.no_grad()
    def _take_step(self) -> None:
        moving = [(group, with_gradients(group["params"])) for group in self.param_groups]
        grads = [grad for _, pairs in moving for _, grad in pairs]
        if not grads:
            return
        grad_scale = self._begin_step(grads)
        projected = [
            _Moving(group, *pair, self._projections[pair[0]])
            for group, pairs in moving if is_projected(group) for pair in pairs
        ]  # fmt: skip
        for each in projected:
            if not self.state.get(each.param):
                each.projection.start()
        first = [each for each in projected if not each.projection.has_bases]
        if first and not self._make_first(first, grad_scale):
            return
        for each in projected:
            if each.projection.due and each.projection.has_bases:
                self._refresh(each, grad_scale)
        plain = [group for group in self.param_groups if not is_projected(group)]
        self._update(gather(plain, self._state_of), grad_scale)
        for portion in _portions(projected):
            self._step_slots(portion, grad_scale)
        for each in projected:
            each.projection.advance()

    def _make_first(self, moving: list[_Moving], grad_scale: Tensor) -> bool:
        """Make first bases; false, and none made, if this step is skipped. All else in a step asks the device nothing.

        Where a gradient is zero throughout there is no basis to find yet: a later step tries again.
        """
        device = moving[0].param.device
        asked = [self.last_skip(device), *(each.grad.any().to(device) for each in moving)]
        skip, *nonzero = torch.stack(asked).tolist()
        for each, found in zip(moving, nonzero):
            if found and not skip:
                self._refresh(each, grad_scale)
        return not skip

    def _refresh(self, moving: _Moving, grad_scale: Tensor) -> None:
        """Make or refresh the bases that are due and carry the moments along; a skipped step takes both back."""
        state = self._state_of(moving.param)
        before = {name: value.clone() for name, value in state.items()} if moving.projection.has_bases else {}
        if moving.projection.refresh(state, moving.grad):
            moments = self.moments(moving.param)
            projected = moving.projection.project(state, moving.grad) * grad_scale.to(moving.grad.device)
            carried = moving.projection.transport(*moments, state["step"], moving.group["betas"], projected)
            self.set_moments(moving.param, *carried)
        skip = self.last_skip(moving.param.device)
        for name, old in before.items():
            state[name].copy_(torch.where(skip, old, state[name]))

    def _step_slots(self, portion: list[_Moving], grad_scale: Tensor) -> None:
        """Step a zero slot of each matrix with its projected gradient, and fold what comes out into the matrix."""
        owners: dict[Tensor, Tensor] = {}
        groups = []
        for _, members in groupby(portion, key=lambda each: id(each.group)):
            some = list(members)
            slots = [self._slot(each) for each in some]
            owners.update({slot: each.param for slot, each in zip(slots, some)})
            group = some[0].group
            groups.append({**group, "params": slots, "lr": group["lr"] * group["scale"], "weight_decay": 0.0})
        self._update(gather(groups, lambda slot: self.state[owners[slot]]), grad_scale, owners)
        decays = Decays(self)
        for each, slot in zip(portion, owners):
            # A skipped step left the slot at zero; without the decay the weight stays as it was.
            decay = decays.of(each.group, each.param.device)
            factors = each.projection.factors(self.state[each.param], slot)
            fold_(each.param.detach(), *factors, decay=decay, key=self.step_key(each.param))

    def _slot(self, moving: _Moving) -> Tensor:
        slot = torch.zeros(moving.projection.slot_shape, dtype=torch.float32, device=moving.param.device)
        slot.grad = moving.projection.project(self._state_of(moving.param), moving.grad)
        return slot


def _portions(moving: list[_Moving]) -> Iterator[list[_Moving]]:
    """Yield the matrices in their order, together up to `PORTION_ELEMENTS` of projected gradients at a time."""
    portion: list[_Moving] = []
    elements = 0
    for each in moving:
        size = each.projection.slot_shape.numel()
        if portion and elements + size > PORTION_ELEMENTS:
            yield portion
            portion, elements = [], 0
        portion.append(each)
        elements += size
    if portion:
        yield portion
