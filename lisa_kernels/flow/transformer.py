"""A transformer of flow matching whose groups of layers are experts for a part of the time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lisa_kernels.errors import InputError
from lisa_kernels.flow.block import FlowBlock, Rotate
from lisa_kernels.flow.embeddings import ClassEmbedding, Head, Patches, TimeEmbedding
from lisa_kernels.flow.intervals import Intervals
from lisa_kernels.flow.residual_attention import ContextKeys, check_reuse
from lisa_kernels.flow.route import Route

# What image tokens see beside the image, and how queries and keys turn by their places.
Seen = tuple[ContextKeys | None, Rotate | None]


@dataclass(frozen=True)
class FlowShape:
    """The sizes of a flow transformer.

    channels, height, width: of an image; patch: side of a token, in pixels. hidden: numbers of a token. layers: of all
    groups together. expansion: width of the feed-forward networks beside hidden. reuse: the residual attention, "none",
    "before" or "after" the softmax. Raises InputError for sizes that do not fit.
    """

    channels: int
    height: int
    width: int
    classes: int
    patch: int = 2
    hidden: int = 128
    layers: int = 8
    heads: int = 4
    expansion: int = 4
    reuse: str = "none"

    def __post_init__(self) -> None:
        """Check every size."""
        for name, value in asdict(self).items():
            if name != "reuse" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise InputError(f"{name} is {value!r}; a whole number of at least 1 is wanted.")
        if self.hidden % self.heads:
            raise InputError(f"{self.heads} heads do not divide a hidden size of {self.hidden}; change one of the two.")
        check_reuse(self.reuse)


class GroupedFlow(nn.Module):
    """The velocity of images at times t under a condition; of its layers only one group's run.

    While it trains that is the active group of `route`, which `attach` sets; in evaluation the group that t belongs to,
    and a batch whose times belong to several is computed group by group. Patch embedding, embedding of t and head are
    shared by all groups. any_class: the label of no class in particular, for guidance.
    """

    any_class: int

    def __init__(self, shape: FlowShape, intervals: Intervals, blocks: Callable[[Route], list[FlowBlock]]) -> None:
        super().__init__()
        self.shape, self.route = shape, Route(shape.layers, intervals)
        image = shape.channels, shape.height, shape.width, shape.patch, shape.hidden
        self.patches = Patches(*image)
        self.times = TimeEmbedding(shape.hidden)
        self.blocks = nn.ModuleList(blocks(self.route))
        self.head = Head(*image, shape.hidden)

    def forward(self, x: Tensor, t: Tensor, condition: Any) -> Tensor:
        """Return the velocity [batch, channels, height, width].

        x: the same shape; t: [batch] from 0, noise, to 1, data; condition: what `condition` returns for labels.
        """
        return by_group(self.route, self.training, self._velocity, x, t, condition)

    def condition(self, labels: Tensor) -> Any:
        """Return what forward takes for labels, int64 [batch]."""
        raise NotImplementedError

    def like(self) -> GroupedFlow:
        """Return a model of the same form with weights of its own, on the CPU."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """Return plain values from which the same model can be made, its weights aside."""
        return {"shape": asdict(self.shape), "intervals": self.route.intervals.state()}

    def _velocity(self, group: int, x: Tensor, times: Tensor, condition: Any) -> Tensor:
        embedding, seen = self._conditioned(times, condition)
        tokens, previous = self.patches(x), None
        for number in self.route.blocks_of(group):
            tokens, previous = self.blocks[number](tokens, embedding, previous, *seen(number))
        velocity: Tensor = self.head(tokens, embedding)
        return velocity

    def _conditioned(self, times: Tensor, condition: Any) -> tuple[Tensor, Callable[[int], Seen]]:
        """Return the embedding [batch, hidden], and for a block's number what its tokens see beside the image."""
        raise NotImplementedError


class FlowTransformer(GroupedFlow):
    """A flow with layers of its own, told the class by an embedding that is added to that of t."""

    def __init__(self, shape: FlowShape, intervals: Intervals) -> None:
        super().__init__(
            shape, intervals,
            lambda route: [
                FlowBlock.fresh(shape.hidden, shape.heads, shape.expansion, shape.reuse, first=number % route.size == 0)
                for number in range(shape.layers)
            ],
        )  # fmt: skip
        self.classes = ClassEmbedding(shape.classes, shape.hidden)
        self.any_class = self.classes.any

    def condition(self, labels: Tensor) -> Tensor:
        """Return the labels."""
        return labels

    def like(self) -> FlowTransformer:
        """Return a model of the same form with weights of its own, on the CPU."""
        return FlowTransformer(self.shape, self.route.intervals)

    def _conditioned(self, times: Tensor, condition: Tensor) -> tuple[Tensor, Callable[[int], Seen]]:
        return self.times(times) + self.classes(condition), lambda _: (None, None)


def by_group(
    route: Route, training: bool, run: Callable[..., Tensor], x: Tensor, times: Tensor, condition: Any
) -> Tensor:  # fmt: skip
    """Return run(group, x, times, condition), in evaluation of each group's part of the batch in turn.

    condition: a tensor [batch, ...], or what takes places in the batch as a tensor does.
    """
    if len(times) != len(x):
        raise InputError(f"{len(times)} times were given for {len(x)} images; one for each is wanted.")
    if training or route.held is not None:
        return run(route.choose(times, training), x, times, condition)
    parts = route.split(times)
    if len(parts) == 1:
        return run(parts[0][0], x, times, condition)
    velocity = torch.empty_like(x)
    for group, places in parts:
        velocity[places] = run(group, x[places], times[places], condition[places])
    return velocity
