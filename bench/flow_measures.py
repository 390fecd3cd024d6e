"""What the experiment measures: quality of velocities and samples, and what training and sampling cost."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.held_bytes import saved_for_backward
from lisa_kernels.flow import ExpertsAdamW
from lisa_kernels.flow.data import load_images
from lisa_kernels.flow.path import flow_loss, interpolate
from lisa_kernels.flow.sample import sample
from lisa_kernels.flow.transformer import FlowTransformer

BINS = 12
NOISES = 2
PER_CLASS, SAMPLE_STEPS = 40, 20
TIMED_BATCHES = (1, 256)


# Pictures held out, and passes over those to train on that make a judge of them.
HELD_OUT, PASSES = {"digits": 397, "fashion-mnist": 500}, {"digits": 400, "fashion-mnist": 12}


@dataclass(frozen=True)
class Pictures:
    """pixels: float32 [images, 1, side, side] from −1 to 1; labels: int64 [images], of ten classes."""

    pixels: Tensor
    labels: Tensor


def load_pictures(data: str) -> tuple[Pictures, Pictures]:
    """Return the pictures of "digits" or "fashion-mnist[:FOLDER]" in a fixed random order: to train on, held out."""
    found, held_out = load_images(data), HELD_OUT[data.partition(":")[0]]
    order = torch.randperm(len(found.pixels), generator=torch.Generator().manual_seed(0))
    kept, out = order[held_out:], order[:held_out]
    return Pictures(found.pixels[kept], found.labels[kept]), Pictures(found.pixels[out], found.labels[out])


class Judge:
    """A classifier trained on real pictures: its answers, and its 64 hidden numbers as features."""

    def __init__(self, train: Pictures, passes: int = PASSES["digits"]) -> None:
        from sklearn.neural_network import MLPClassifier

        classifier = MLPClassifier((64,), max_iter=passes, random_state=0, early_stopping=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it could learn on
            classifier.fit(train.pixels.flatten(1).numpy(), train.labels.numpy())
        self._weights = [torch.from_numpy(each).double() for each in classifier.coefs_]
        self._biases = [torch.from_numpy(each).double() for each in classifier.intercepts_]

    def features(self, pixels: Tensor) -> Tensor:
        """Return float64 [images, 64]."""
        return torch.relu(pixels.flatten(1).double() @ self._weights[0] + self._biases[0])

    def accuracy(self, pixels: Tensor, labels: Tensor) -> float:
        """Return the share of images that are taken for what they should be."""
        answers = (self.features(pixels) @ self._weights[1] + self._biases[1]).argmax(1)
        return float((answers == labels).double().mean())


def frechet(one: Tensor, other: Tensor) -> float:
    """Return the Fréchet distance of two sets of features, [n, d] and [m, d], as of normal distributions."""
    first, second = torch.cov(one.T), torch.cov(other.T)
    values, vectors = torch.linalg.eigh(first)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    shared = torch.linalg.eigvalsh(root @ second @ root).clamp_min(0).sqrt().sum()
    apart = (one.mean(0) - other.mean(0)).square().sum()
    return float(apart + first.trace() + second.trace() - 2 * shared)


def kernel_distance(one: Tensor, other: Tensor) -> float:
    """Return the squared kernel distance of two sets of features, [n, d] and [m, d], cubic kernel, without bias."""
    width = one.shape[1]

    def mean(first: Tensor, second: Tensor, itself: bool = False) -> Tensor:
        values = (first @ second.T / width + 1) ** 3
        if not itself:
            return values.mean()
        return (values.sum() - values.trace()) / (len(first) * (len(first) - 1))

    return float(mean(one, one, True) + mean(other, other, True) - 2 * mean(one, other))


def nearest(pixels: Tensor, train: Tensor) -> float:
    """Return the median distance of images to the nearest one in training, in pixels' units from −1 to 1."""
    return float(torch.cdist(pixels.flatten(1), train.flatten(1)).amin(1).median())


@torch.no_grad()
def losses_by_time(model: FlowTransformer, held_out: Pictures) -> list[float]:
    """Return the flow loss in each of 12 equal parts of time, on noise and times that are the same for all models."""
    generator, found = torch.Generator().manual_seed(1), []
    for part in range(BINS):
        losses = []
        for _ in range(NOISES):
            noise = torch.randn(held_out.pixels.shape, generator=generator)
            t = (part + torch.rand(len(noise), generator=generator)) / BINS
            losses.append(float(flow_loss(model, held_out.pixels, t, held_out.labels, noise)))
        found.append(sum(losses) / NOISES)
    return found


@torch.no_grad()
def seams(model: FlowTransformer, held_out: Pictures) -> list[float]:
    """Return ‖v_k − v_{k+1}‖ / ‖v_k‖ at each boundary between groups, over held-out images."""
    noise, found = torch.randn(held_out.pixels.shape, generator=torch.Generator().manual_seed(2)), []
    for group, bound in enumerate(model.route.intervals.bounds[1:-1]):
        t = torch.full((len(noise),), bound)
        x, velocities = interpolate(noise, held_out.pixels, t), []
        for side in (group, group + 1):
            with model.route.holding(side):
                velocities.append(model(x, t, held_out.labels))
        found.append(float((velocities[0] - velocities[1]).norm() / velocities[0].norm()))
    return found


def _picture(model: FlowTransformer) -> tuple[int, int, int]:
    return model.shape.channels, model.shape.height, model.shape.width


def samples(model: FlowTransformer) -> tuple[Tensor, Tensor]:
    """Return (images within [−1, 1], labels), as many of each class, from noise that is the same for all models."""
    labels = torch.arange(10).repeat_interleave(PER_CLASS)
    noise = torch.randn(len(labels), *_picture(model), generator=torch.Generator().manual_seed(3))
    return sample(model, model.route, noise, labels, steps=SAMPLE_STEPS).clamp(-1, 1), labels


def quality(model: FlowTransformer, train: Pictures, held_out: Pictures, judge: Judge) -> dict[str, Any]:
    """Return everything that is said of a model's velocities and samples."""
    model.eval()
    losses = losses_by_time(model, held_out)
    images, labels = samples(model)
    drawn, real = judge.features(images), judge.features(held_out.pixels)
    return {
        "loss": sum(losses) / BINS, "losses": losses, "accuracy": judge.accuracy(images, labels),
        "frechet": frechet(drawn, real), "kernel": kernel_distance(drawn, real),
        "nearest": nearest(images, train.pixels), "seams": seams(model, held_out),
    }  # fmt: skip


def real_quality(train: Pictures, held_out: Pictures, judge: Judge) -> dict[str, Any]:
    """Return the same of real pictures: some of those to train on, as many as samples, against those held out."""
    some = judge.features(train.pixels[: 10 * PER_CLASS])
    return {
        "accuracy": judge.accuracy(held_out.pixels, held_out.labels),
        "frechet": frechet(some, judge.features(held_out.pixels)),
        "kernel": kernel_distance(some, judge.features(held_out.pixels)),
        "nearest": nearest(held_out.pixels, train.pixels),
    }  # fmt: skip


def layers_per_evaluation(model: FlowTransformer, labels: Tensor) -> int:
    """Return how many blocks a step of a solver runs, counted by hooks."""
    ran: list[int] = []
    hooks = [block.register_forward_hook(lambda *_: ran.append(1)) for block in model.blocks]
    sample(model.eval(), model.route, torch.zeros(len(labels), *_picture(model)), labels, steps=model.route.groups)
    for hook in hooks:
        hook.remove()
    return len(ran) // model.route.groups


def milliseconds_per_image(model: FlowTransformer, batch: int) -> float:
    """Return the processor's time for an image, the least of three runs of 20 steps."""
    labels, noise, found = torch.arange(batch) % 10, torch.randn(batch, *_picture(model)), []
    for _ in range(3):
        begin = time.process_time()
        sample(model.eval(), model.route, noise, labels, steps=SAMPLE_STEPS)
        found.append((time.process_time() - begin) * 1e3 / batch)
    return min(found)


def training_bytes(model: nn.Module, optimizer: ExpertsAdamW, loss: Any) -> dict[str, int]:
    """Return the bytes of one step's activations, gradients and moments on the device, each at its most.

    loss: makes the loss. Moments are those in the slots of the store of paged state, what comes ahead included.
    """
    store, device = optimizer.store, next(model.parameters()).device
    assert store is not None
    most = store.device_bytes(device)  # type: ignore[attr-defined]

    def look(_: Tensor) -> None:
        nonlocal most
        most = max(most, store.device_bytes(device))  # type: ignore[attr-defined]

    store.watchers.append(look)  # type: ignore[attr-defined]
    with saved_for_backward(model.parameters()) as saved:
        value = loss()
    value.backward()
    gradients = sum(param.grad.nbytes for param in model.parameters() if param.grad is not None)
    optimizer.step()
    optimizer.zero_grad()
    return {"saved_bytes": sum(saved.values()), "gradient_bytes": gradients, "moment_bytes": most}
