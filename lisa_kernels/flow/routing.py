"""Let any model whose forward goes through a list of blocks run by route: only one group's blocks, by the time."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor, nn

from lisa_kernels.errors import InputError
from lisa_kernels.flow.intervals import Intervals
from lisa_kernels.flow.route import Route
from lisa_kernels.layers import find_blocks
from lisa_kernels.uncompiled import uncompiled

# What models call the time they are given.
TIME_NAMES = ("t", "timestep", "timesteps", "time")


@dataclass(frozen=True)
class Clock:
    """How a model is told the time: the name of its argument, and what stands there for noise and for data.

    name: None for one of t, timestep, timesteps and time. noise, data: 0 and 1 are the flow's own t; a diffusion model
    of diffusers with 1,000 steps has noise=1000, data=0.
    """

    name: str | None = None
    noise: float = 0.0
    data: float = 1.0

    def __post_init__(self) -> None:
        """Check that the two ends differ."""
        if not isinstance(self.noise, (int, float)) or not isinstance(self.data, (int, float)):
            raise InputError(f"a clock from {self.noise!r} to {self.data!r} was given; two numbers are wanted.")
        if self.noise == self.data:
            raise InputError(f"a clock has {self.noise:g} for noise and for data; two different numbers are wanted.")

    @property
    def plain(self) -> bool:
        """Whether the model's time is t itself."""
        return (self.noise, self.data) == (0.0, 1.0)

    def of(self, t: Tensor) -> Tensor:
        """Return what the model is told at times t."""
        return t if self.plain else self.noise + (self.data - self.noise) * t

    def read(self, told: float | Tensor) -> float | Tensor:
        """Return t by what the model is told."""
        if self.plain:
            return told
        told = told.to(torch.float64) if isinstance(told, Tensor) else float(told)
        return (told - self.noise) / (self.data - self.noise)

    def coarseness(self, told: float | Tensor) -> float:
        """Return how far t may be from what was drawn: a step where those are whole, else a rounding."""
        if self.plain or not isinstance(told, Tensor):
            return 0.0
        rounding = torch.finfo(told.dtype).eps * max(abs(self.noise), abs(self.data)) if told.is_floating_point() else 1
        return rounding / abs(self.data - self.noise)


class RoutedBlocks(nn.ModuleList):
    """A list of blocks of which a forward under way sees one group only; its first is then number 0.

    So an output layer that reads something of block 0, as that of diffusers' DiT does, has it of the group that runs.
    """

    # The numbers of the blocks that a forward under way sees, and whether it has looked.
    running: range | None = None
    seen = False

    def __init__(self, blocks: nn.ModuleList) -> None:
        super().__init__(blocks)
        self.training = blocks.training

    def _shown(self) -> list[nn.Module]:
        blocks = [block for block in self._modules.values() if block is not None]
        if self.running is None:
            return blocks
        self.seen = True
        return blocks[self.running.start : self.running.stop]

    def __iter__(self) -> Iterator[nn.Module]:
        """Go through the blocks that run."""
        return iter(self._shown())

    def __len__(self) -> int:
        """Return how many blocks run."""
        return len(self._shown())

    @overload
    def __getitem__(self, place: slice) -> nn.ModuleList: ...
    @overload
    def __getitem__(self, place: int) -> nn.Module: ...
    def __getitem__(self, place: int | slice) -> nn.Module:
        """Return one of the blocks that run, or some."""
        found = self._shown()[place]
        return nn.ModuleList(found) if isinstance(found, list) else found


class Router:
    """The hooks that let a model run by its route; `blocks` is None where the model's own forward asks the route.

    before_run: told the group before each forward that reads the time.
    """

    def __init__(self, route: Route, blocks: RoutedBlocks | None, clock: Clock, reader: nn.Module) -> None:
        self.route, self.blocks, self.clock = route, blocks, clock
        self.before_run: Callable[[int], None] | None = None
        self._parameters = list(inspect.signature(reader.forward).parameters)
        self._name = _time_name(reader, clock)
        self._hooks = [
            reader.register_forward_pre_hook(self.enter, with_kwargs=True),
            reader.register_forward_hook(self.leave, always_call=True),
        ]

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy of the model goes on with: its route, and nothing of who trains this one."""
        return {**vars(self), "before_run": None}

    @uncompiled
    def enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Choose the group by the time that the model is given."""
        if self.blocks is None and self.before_run is None:
            return
        told = self._time(args, kwargs)
        group = self.route.choose(self.clock.read(told), model.training, self.clock.coarseness(told))
        if self.before_run is not None:
            self.before_run(group)
        if self.blocks is not None:
            self.blocks.running, self.blocks.seen = self.route.blocks_of(group), False

    @uncompiled
    def leave(self, model: nn.Module, args: Any, output: Any) -> None:
        """Show all blocks again."""
        if self.blocks is None:
            return
        self.blocks.running = None
        # There is no output where the forward raised.
        if output is not None and not self.blocks.seen:
            raise InputError(
                f"the forward of {type(model).__name__} does not go through the list of its blocks, so that nothing "
                "chooses among them; layers that are experts need a model that does."
            )

    def remove(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()

    def _time(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float | Tensor:
        place = self._parameters.index(self._name)
        told = args[place] if place < len(args) else kwargs.get(self._name)
        if told is None:
            raise InputError(f"the forward was given no {self._name}; the time chooses the blocks that run.")
        return told  # type: ignore[no-any-return]


def _time_name(reader: nn.Module, clock: Clock) -> str:
    parameters = inspect.signature(reader.forward).parameters
    wanted = (clock.name,) if clock.name is not None else TIME_NAMES
    for name in wanted:
        if name in parameters:
            return name
    raise InputError(
        f"the forward of {type(reader).__name__} has no argument {' or '.join(wanted)}; say what it calls the time, as "
        f'in Clock("sigma", noise=1.0, data=0.0): it has {", ".join(parameters)}.'
    )


def router_of(model: nn.Module) -> Router | None:
    """Return the router of a model that runs by route through `route_model`."""
    hooks = (hook for part in model.modules() for hook in part._forward_pre_hooks.values())
    owners = (getattr(hook, "__self__", None) for hook in hooks)
    return next((owner for owner in owners if isinstance(owner, Router)), None)


def route_model(
    model: nn.Module, intervals: Intervals, blocks: str | None = None, clock: Clock | None = None
) -> Router:  # fmt: skip
    """Let the model run, from here on, only the blocks that the time is for, and return what does that.

    blocks: the path of the list of blocks, where it is not found by structure. A model that was routed before, or has a
    `Route` of its own as `route` beside its blocks, keeps it, with the overlap and distribution of `intervals`.
    Parameters keep their names. Raises InputError, the model untouched, where it cannot be routed so.
    """
    clock = clock or Clock()
    path, _ = find_blocks(model, blocks)
    parent = model.get_submodule(path.rpartition(".")[0])
    known = router_of(model)
    own = getattr(parent, "route", None) if known is None else known.route
    if isinstance(own, Route):
        if own.intervals.bounds != intervals.bounds:
            raise InputError(
                f"the model's groups have the boundaries {list(own.intervals.bounds)}, and {list(intervals.bounds)} "
                "were given; give those of the model, for it learnt them."
            )
        if known is not None and known.clock != clock:
            raise InputError(f"the model runs by {known.clock}, and {clock} was given; give that of the model.")
        if known is None and not clock.plain:
            raise InputError(f"the model chooses its blocks by t from 0 to 1, and {clock} was given; leave it out.")
        own.intervals = intervals
        return known or Router(own, None, clock, _reader(model, path, clock))
    listed = parent.get_submodule(path.rpartition(".")[2])
    assert isinstance(listed, nn.ModuleList)
    route = Route(len(listed), intervals)
    reader = _reader(model, path, clock)
    routed = RoutedBlocks(listed)
    setattr(parent, path.rpartition(".")[2], routed)
    return Router(route, routed, clock, reader)


def unroute_model(model: nn.Module) -> None:
    """Undo `route_model`: a forward runs all blocks again, or what the model's own forward chooses."""
    router = router_of(model)
    if router is None:
        return
    router.remove()
    for part in list(model.modules()):
        for name, child in part.named_children():
            if child is router.blocks:
                setattr(part, name, nn.ModuleList(child.children()))


def _reader(model: nn.Module, path: str, clock: Clock) -> nn.Module:
    """Return the innermost module around the blocks whose forward is given the time."""
    names = path.split(".")[:-1]
    around = [model.get_submodule(".".join(names[:depth])) for depth in range(len(names), -1, -1)]
    wanted = (clock.name,) if clock.name is not None else TIME_NAMES
    for module in around:
        if set(wanted) & set(inspect.signature(module.forward).parameters):
            return module
    return around[-1]
