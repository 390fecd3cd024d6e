"""Attach a method to a model: from here on an ordinary torch optimizer, and an ordinary model after `detach()`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lisa_kernels.distributed import check_one_process
from lisa_kernels.errors import InputError
from lisa_kernels.layers import check_attachable, without_compiler
from lisa_kernels.methods.definitions import Method
from lisa_kernels.methods.sampled_adamw import SampledAdamW
from lisa_kernels.methods.survey import Survey, survey_model
from lisa_kernels.methods.units import make_layout
from lisa_kernels.optim.settings import check_hyper, check_settings
from lisa_kernels.samplers import Sampler
from lisa_kernels.scores import compute_scores


def attach(
    model: nn.Module, method: Method, lr: float = 1e-4, *, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
    weight_decay: float = 1e-2, block_size: int = 256, rounding: str = "stochastic", seed: int = 0,
    max_grad_norm: float | None = None, calibration: Iterable[Mapping[str, Tensor]] | None = None,
    scores: Sequence[float] | None = None, blocks: str | None = None, keep_logits: bool = False,
    paging: str | None = None, ranks: Any = "auto",
) -> SampledAdamW:  # fmt: skip
    """Prepare `model` for `method` and return its optimizer, whose `step()` also switches layers.

    calibration: batches (input_ids, …) for scores that need data, see `layer_scores`. scores: one number per layer,
    where they were computed before. blocks: the path of the decoder blocks where they are not found by themselves.
    weight_decay leaves vectors (norms, biases) alone; max_grad_norm clips inside the step, and paging says where the
    moments are between steps, see `AdamW8bit`; what `retired_state="page"` puts away goes there too. In training
    the loss of a language model is computed without forming the logits of all tokens, where that is exact (its loss is
    the cross entropy of its output layer's logits, scaled and capped or not), which a forward of a few tokens finds out
    here; keep_logits=True leaves the loss to the model. Tokens that are no label cost nothing there where the labels
    are given on the CPU; of labels on a GPU all take part, for to leave some out the host would wait. The model's own
    parameters stay what they are; linears that get a low-rank slot are swapped until `detach()`. What was frozen before
    stays frozen, which is said once; a layer that is frozen whole keeps its number and is never drawn. Of a compiled
    model the one inside is attached. Several processes of torch.distributed are refused, unless ranks=None says that
    the caller reduces gradients.
    Raises InputError, the model untouched, for anything that cannot work.
    """
    if not isinstance(method, Method):
        raise InputError(f"method is {method!r}; an instance such as OwLore(active_layers=5) is wanted.")
    model = without_compiler(model)
    check_attachable(model)
    _check_ranks(ranks)
    settings: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    check_hyper(settings)
    check_settings(block_size, rounding, max_grad_norm, paging)
    survey = survey_model(model, method, blocks)
    sampler = _make_sampler(survey, seed, _scores(survey, calibration, scores))
    layout = make_layout(survey, seed)
    kind: type[SampledAdamW] = method.optimizer or SampledAdamW
    try:
        optimizer = kind(
            model, method, layout, sampler, block_size=block_size, rounding=rounding, seed=seed,
            max_grad_norm=max_grad_norm, paging=paging, keep_logits=keep_logits, **settings
        )  # fmt: skip
    except BaseException:
        for swap in layout.swaps:
            swap.undo()
        raise
    _tell_what_differs(survey)
    return optimizer


def _check_ranks(ranks: Any) -> None:
    if ranks is None:
        return
    if ranks != "auto":
        raise InputError(f'ranks is {ranks!r}; "auto" or None is wanted.')
    check_one_process()


def _tell_what_differs(survey: Survey) -> None:
    """Warn of what the method does otherwise than its name says: for `attach`'s caller."""
    if survey.method.form == "low-rank" and not survey.places():
        warnings.warn(
            f"no linear layer in the blocks of {type(survey.model).__name__} can carry a low-rank slot (their classes "
            "multiply in their own way, or they are frozen); its layers train at full rank, and take its memory.",
            stacklevel=3,
        )
    if survey.beyond:
        warnings.warn(
            f"{len(survey.beyond)} matrices (first: {survey.beyond[0]}) are no linear layers, so that no adapter "
            "reaches them and they stay as they are; OwLore, GaLore and LISA train them.",
            stacklevel=3,
        )
    names = survey.frozen_names()
    if names:
        warnings.warn(
            f"{len(names)} parameters (first: {names[0]}) were frozen before attaching (requires_grad=False) and stay "
            "frozen; to train them, detach(), call requires_grad_(True) on them and attach again.",
            stacklevel=3,
        )
    if heads := survey.resting_head():
        warnings.warn(
            f"method {survey.method.name!r} trains nothing of {', '.join(heads)}, which transformers makes anew for a "
            'task: if the checkpoint has no weights for it, it stays random. Use a method with embeddings="always".',
            stacklevel=3,
        )


def _scores(
    survey: Survey, calibration: Iterable[Mapping[str, Tensor]] | None, given: Sequence[float] | None
) -> Sequence[float] | None:  # fmt: skip
    """Return positive weights for the draw, as given to the method or to attach, or computed; None if none are used."""
    method, count = survey.method, len(survey.blocks)
    wanted = method.get("scores", None)
    if wanted in (None, "gradient-norm"):
        return None
    given = wanted if not isinstance(wanted, str) else given
    kind = method.score_kind()
    if given is None and kind is not None:
        return _positive(compute_scores(kind, survey.model, survey.blocks, calibration), kind)
    if given is None or len(given) != count:
        raise InputError(f"{len(given or ())} scores were given; {count} numbers are wanted, one per layer.")
    if not all(0 <= score < math.inf for score in given):
        raise InputError(f"the scores are {list(given)}; finite numbers of at least 0 are wanted.")
    return _positive(list(given), "given")


def _make_sampler(survey: Survey, seed: int, scores: Sequence[float] | None) -> Sampler | None:
    """Return the sampler over the units that can be drawn; embedding and head get the mean score of the blocks."""
    drawable = survey.drawable
    if scores:
        outer = len(survey.drawn) - len(scores)
        every = [*scores, *[sum(scores) / len(scores)] * outer]
        scores = [every[number] for number in drawable]
    return survey.method.make_sampler(len(drawable), seed, scores)


def _positive(scores: list[float], kind: str) -> list[float]:
    """Raise scores of zero to the smallest positive one: a layer without outliers still trains, if seldom."""
    smallest = min((score for score in scores if score > 0), default=None)
    if smallest is None:
        warnings.warn(f"every {kind} score of this model is 0; its layers are drawn uniformly.", stacklevel=4)
        return [1.0] * len(scores)
    return [max(score, smallest) for score in scores]
