"""The loss of a flow on images that are held out, over the whole of time and in each group's part."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lisa_kernels.flow.data import Images
from lisa_kernels.flow.path import flow_loss
from lisa_kernels.flow.transformer import GroupedFlow

_BATCH = 256


@dataclass(frozen=True)
class HeldOutLoss:
    """mean: as training draws times; of_groups: the mean in each group's interval."""

    mean: float
    of_groups: list[float]


@torch.no_grad()
def held_out_loss(model: GroupedFlow, images: Images, seed: int) -> HeldOutLoss | None:
    """Return the loss on common noise and times, the same for the same seed; None without images.

    Each image takes one time in each group's interval, spread evenly over what training draws there.
    """
    if not len(images):
        return None
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    noise = torch.randn(images.pixels.shape, generator=torch.Generator().manual_seed(seed))
    route, losses, shares = model.route, list[float](), list[float]()
    intervals = route.intervals
    places = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)) + 0.5
    for group in range(route.groups):
        low, high = (intervals.times.cumulative(t) for t in intervals.interval(group))
        times = intervals.times.quantiles(low + (high - low) * places / len(images)).float()
        total = 0.0
        with route.holding(group):
            for start in range(0, len(images), _BATCH):
                parts = (
                    each[start : start + _BATCH].to(device) for each in (images.pixels, times, images.labels, noise)
                )
                pixels, at, labels, dark = parts
                total += float(flow_loss(model, pixels, at, model.condition(labels), dark)) * len(pixels)
        losses.append(total / len(images))
        shares.append(high - low)
    model.train(was_training)
    return HeldOutLoss(sum(loss * share for loss, share in zip(losses, shares)), losses)
