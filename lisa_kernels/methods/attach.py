"""Attach a method to a model: from here on an ordinary torch optimizer, and an ordinary model after `detach()`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lisa_kernels.errors import InputError
from lisa_kernels.layers import check_attachable, find_blocks
from lisa_kernels.methods.adapter_layout import adapter_layout, check_adapter_layout
from lisa_kernels.methods.definitions import LoRAFA, Method
from lisa_kernels.methods.sampled_adamw import SampledAdamW
from lisa_kernels.methods.scoring import layer_scores
from lisa_kernels.methods.units import Layout, check_layered_layout, layered_layout


def attach(
    model: nn.Module, method: Method, lr: float = 1e-4, *, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
    weight_decay: float = 1e-2, block_size: int = 256, rounding: str = "stochastic", seed: int = 0,
    max_grad_norm: float | None = None, calibration: Iterable[Mapping[str, Tensor]] | None = None,
    scores: Sequence[float] | None = None, blocks: str | None = None, keep_logits: bool = False,
    paging: str | None = None,
) -> SampledAdamW:  # fmt: skip
    """Prepare `model` for `method` and return its optimizer, whose `step()` also switches layers.

    calibration: batches (input_ids, …) for scores that need data, see `layer_scores`. scores: one number per layer,
    where they were computed before. blocks: the path of the decoder blocks where they are not found by themselves.
    weight_decay leaves vectors (norms, biases) alone; max_grad_norm clips inside the step, and paging says where the
    moments are between steps, see `AdamW8bit`; what `retired_state="page"` puts away goes there too. In training
    the loss of a language model is computed without forming the logits of all tokens, where that is exact (its loss is
    the cross entropy of its output layer's logits, scaled and capped or not), which a forward of a few tokens finds out
    here; keep_logits=True leaves the loss to the model. The model's own parameters stay what they are; linears that
    get a low-rank slot are swapped until `detach()`. Raises InputError, the model untouched, for anything that cannot
    work.
    """
    if not isinstance(method, Method):
        raise InputError(f"method is {method!r}; an instance such as OwLore(active_layers=5) is wanted.")
    check_attachable(model)
    # Before the scores, which may take minutes.
    _check_layout(model, method, blocks)
    scores = _scores(model, method, calibration, scores, blocks)
    layout = make_layout(model, method, seed, blocks)
    try:
        sampler = method.make_sampler(len(layout.drawn), seed, scores and _with_outer(scores, len(layout.drawn)))
        settings: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        return SampledAdamW(
            model, method, layout, sampler, block_size=block_size, rounding=rounding, seed=seed,
            max_grad_norm=max_grad_norm, paging=paging, keep_logits=keep_logits, **settings
        )  # fmt: skip
    except BaseException:
        for swap in layout.swaps:
            swap.undo()
        raise


def _check_layout(model: nn.Module, method: Method, blocks: str | None) -> None:
    if isinstance(method, LoRAFA):
        check_adapter_layout(model, method)
    else:
        check_layered_layout(model, method, blocks)


def make_layout(model: nn.Module, method: Method, seed: int = 0, blocks: str | None = None) -> Layout:
    """Prepare the model for a method that fits it; raises InputError for one that does not."""
    if isinstance(method, LoRAFA):
        return adapter_layout(model, method, seed)
    return layered_layout(model, method, seed, blocks)


def _scores(
    model: nn.Module, method: Method, calibration: Iterable[Mapping[str, Tensor]] | None,
    given: Sequence[float] | None, blocks: str | None,
) -> Sequence[float] | None:  # fmt: skip
    """Return positive weights for the draw, as given to the method or to attach, or computed; None if none are used."""
    wanted = method.get("scores", None)
    if wanted in (None, "gradient-norm"):
        return None
    given = wanted if not isinstance(wanted, str) else given
    kind = method.score_kind()
    if given is None and kind is not None:
        return _positive(layer_scores(model, kind, calibration, blocks=blocks), kind)
    _, found = find_blocks(model, blocks)
    if given is None or len(given) != len(found):
        raise InputError(f"{len(given or ())} scores were given; {len(found)} numbers are wanted, one per layer.")
    if not all(0 <= score < math.inf for score in given):
        raise InputError(f"the scores are {list(given)}; finite numbers of at least 0 are wanted.")
    return _positive(list(given), "given")


def _positive(scores: list[float], kind: str) -> list[float]:
    """Raise scores of zero to the smallest positive one: a layer without outliers still trains, if seldom."""
    smallest = min((score for score in scores if score > 0), default=None)
    if smallest is None:
        warnings.warn(f"every {kind} score of this model is 0; its layers are drawn uniformly.", stacklevel=4)
        return [1.0] * len(scores)
    return [max(score, smallest) for score in scores]


def _with_outer(scores: Sequence[float], units: int) -> list[float]:
    """Give embedding and head, where they are in the draw, the mean score of the blocks."""
    return [*scores, *[sum(scores) / len(scores)] * (units - len(scores))]
