"""Short training runs on any device: methods, batches and what a run leaves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from families import DECODERS, tokens
from torch import Tensor

import lisa_kernels
from lisa_kernels import attach

STEPS = 3
LR = 1e-2


def _methods() -> dict[str, Any]:
    made = {}
    for embeddings in ("always", "low-rank", "frozen", "sampled"):
        outer = {"embeddings": embeddings, "rank": 8}
        made[f"lisa-{embeddings}"] = lisa_kernels.LISA(1, 2, **outer)
        made[f"ows-{embeddings}"] = lisa_kernels.OWS(1, 2, **outer, scores="outlier")
        made[f"owlore-{embeddings}"] = lisa_kernels.OwLore(1, 2, **outer, gap=2)
        made[f"badam-{embeddings}"] = lisa_kernels.BAdam(2, **outer)
    made["ows-adaptive"] = lisa_kernels.OWS(1, 2, scores="gradient-norm")
    made["owlore-remainder"] = lisa_kernels.OwLore(1, 2, rank=8, gap=2, retired_state="keep", master="remainder")
    made["owlore-page"] = lisa_kernels.OwLore(1, 2, rank=8, gap=2, retired_state="page")
    made["owlore-resting"] = lisa_kernels.OwLore(1, 2, rank=8, gap=2)
    made["owlore-on-masters"] = lisa_kernels.OwLore(1, 2, rank=8, gap=2)
    made["lisa-resting"] = lisa_kernels.LISA(1, 2)
    made["galore"] = lisa_kernels.GaLore(rank=8, gap=2)
    made["lora"] = lisa_kernels.LoRA(rank=4)
    made["lora-resting"] = lisa_kernels.LoRA(rank=4, embeddings="low-rank")
    made["lora-fa"] = lisa_kernels.LoRAFA(rank=4)
    made["full"] = lisa_kernels.FullFineTune()
    return made


# Periods of two steps, so that layers are switched and bases refreshed in a short run.
METHODS: dict[str, Any] = _methods()


def at_rest(method: str, kind: str) -> dict[str, Any]:
    """Return how the weights rest beside a method of this name, as `attach` takes it."""
    if method.endswith("on-masters"):
        return {"resting": kind, "active_on": "master"}
    return {"resting": kind} if method.endswith("resting") else {}


class Run(NamedTuple):
    """What a run leaves: the loss of each step and of one more forward, and the model's weights, before and after."""

    losses: list[float]
    before: dict[str, Tensor]
    after: dict[str, Tensor]


def batch(device: str, seed: int) -> dict[str, Tensor]:
    """Return random tokens with labels of which the first three a row are left out."""
    made = tokens(seed=seed)
    made["labels"][:, :3] = -100
    return {name: value.to(device) for name, value in made.items()}


def train(
    family: str | Callable[[], Any],
    method: Any,
    device: str,
    dtype: torch.dtype | None,
    checkpointing: bool = False,
    on_step: Callable[[int, Callable[[], None]], None] = lambda number, step: step(),
    **settings: Any,
) -> Run:
    """Train for some steps, load the state that was saved, and detach.

    dtype: None leaves a model where and as it is made. on_step: is given each step's number and what takes it.
    """
    model = DECODERS[family].make() if isinstance(family, str) else family()
    if dtype is not None:
        model.to(device, dtype)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    before = _weights(model)
    opt = attach(model, method, lr=LR, calibration=[batch(device, 99)], seed=0, **settings)
    batches = [batch(device, seed) for seed in range(STEPS)]
    losses = []
    for number, inputs in enumerate(batches):
        loss = model(**inputs).loss
        loss.backward()
        if "max_grad_norm" not in settings:
            torch.nn.utils.clip_grad_norm_([param for param in model.parameters() if param.grad is not None], 1.0)
        on_step(number, opt.step)
        opt.zero_grad()
        losses.append(loss.detach())
    opt.load_state_dict(opt.state_dict())
    model.eval()
    with torch.no_grad():
        losses.append(model(**batches[0]).loss)
    return Run([float(loss) for loss in losses], before, _weights(opt.detach()))


def _weights(model: Any) -> dict[str, Tensor]:
    return {name: value.detach().float().cpu().clone() for name, value in model.state_dict().items()}
