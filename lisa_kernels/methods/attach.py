"""Attach a method to a model: from here on an ordinary torch optimizer, and an ordinary model after `detach()`."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lisa_kernels.distributed import (
    GradientReduction,
    Ranks,
    Sharing,
    at_rest,
    check_wire_dtype,
    on_first,
    ranks_of,
    settle,
    together,
    units_of,
)
from lisa_kernels.errors import InputError
from lisa_kernels.layers import TappedEmbedding, check_attachable, without_compiler
from lisa_kernels.layers.lowrank import Swap
from lisa_kernels.methods.active_on import on_masters
from lisa_kernels.methods.agreement import agree
from lisa_kernels.methods.code_losses import measure_code_losses
from lisa_kernels.methods.definitions import Method
from lisa_kernels.methods.masters import Masters, check_masters
from lisa_kernels.methods.precision import is_picked
from lisa_kernels.methods.resting import (
    Rest,
    blocks_at_rest,
    check_device,
    check_resting,
    check_resting_where,
    raised_layers,
)
from lisa_kernels.methods.sampled_adamw import SampledAdamW
from lisa_kernels.methods.scoring import scores_of
from lisa_kernels.methods.survey import Survey, survey_model
from lisa_kernels.methods.units import Layout, make_layout
from lisa_kernels.optim.settings import check_hyper, check_settings
from lisa_kernels.samplers import Sampler


def attach(
    model: nn.Module, method: Method, lr: float = 1e-4, *, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
    weight_decay: float = 1e-2, block_size: int = 256, rounding: str = "stochastic", seed: int = 0,
    max_grad_norm: float | None = None, calibration: Iterable[Mapping[str, Tensor]] | None = None,
    scores: Sequence[float] | None = None, blocks: str | None = None, keep_logits: bool = False,
    paging: str | None = None, resting: str | None = None, resting_where: str | os.PathLike[str] | None = None,
    active_on: str | None = None, masters: str | os.PathLike[str] | None = None,
    device: torch.device | str | None = None, ranks: Any = "auto", wire_dtype: str | None = None,
) -> SampledAdamW:  # fmt: skip
    """Prepare `model` for `method` and return its optimizer, whose `step()` also switches layers.

    calibration: batches (input_ids, …) for scores that need data, see `layer_scores`, and for what `resting` may pick.
    scores: one number per layer, where they were computed before. blocks: the path of the decoder blocks where they are
    not found by themselves.
    weight_decay leaves vectors (norms, biases) alone; max_grad_norm clips inside the step, and paging says where the
    moments are between steps, see `AdamW8bit`; what `retired_state="page"` puts away goes there too. In training
    the loss of a language model is computed without forming the logits of all tokens, where that is exact (its loss is
    the cross entropy of its output layer's logits, scaled and capped or not), which a forward of a few tokens finds out
    here; keep_logits=True leaves the loss to the model. Tokens that are no label cost nothing there where the labels
    are given on the CPU; of labels on a GPU all take part, for to leave some out the host would wait. The model's own
    parameters stay what they are; linears that get a low-rank slot are swapped until `detach()`. What was frozen before
    stays frozen, which is said once; a layer that is frozen whole keeps its number and is never drawn. Of a compiled
    model the one inside is attached.

    resting: "int8" or "nf4" keeps the matrices of the decoder blocks and of the output layer in 8 or 4 bits where the
    model computes, those of layers that train too, and their 16-bit masters in host memory, where the token embedding
    is as well; None or "16-bit" leaves them as they are. A size such as "5.5GB" is what the codes and scales of all of
    them may take: those are in 8 bits whose errors in 4 cost most loss for their bytes, by a forward and backward of
    the first batches of `calibration`, on `device` and a block at a time; without any it is small ones first, and what
    is at the ends of the model, as a plan has it. "mixed" does so in the bytes of 8 bits for the matrix with the most
    inputs of each block, which are those in 8 bits without `calibration`. What is learnt is put into the masters when a
    layer leaves or gets a new basis, and it is they that are saved. Adapters learn beside the codes, and what is saved,
    merged or left by `detach()` are masters with the adapters in them. For methods whose layers train through slots or
    adapters (OwLore, GaLore, LoRA) or are drawn (LISA, OWS, BAdam) and one process; embeddings that train at full rank
    stay as they are.
    active_on="master" has drawn layers compute on their masters, which come to the device for the period, and rest anew
    afterwards; "codes" on what they rest in, with slots beside it. Methods that train at full rank need the one, for
    slots the other is the default.

    resting_where: "host" has the codes of the blocks in host memory too, page-locked; the device holds two blocks of
    them, the one in use and the next one on its way, and computes the same bits. A folder has them in a file there,
    which it does not show and which goes with the process; of them the host then holds, page-locked for a GPU, two
    blocks as well (`optimizer.code_bytes_written` and `code_bytes_read` count). "device" (the default) has them all.

    masters: "host" (or None) keeps them in host memory; a folder keeps them in files that are mapped, so that they take
    none but the system's file cache. A master is the file that the model was loaded from, which is never written to,
    until it changes; from then on it is a file of its own in the folder, written anew when a layer is settled
    (`optimizer.master_bytes_written` counts). The folder belongs to this run while it lasts and goes at `detach()`;
    the parameters stay mapped from what was there, and the disk has its place back once the model is gone.

    device: where a model whose weights rest is to compute: each matrix goes there as soon as it rests, and all else
    then, so that neither the device nor the host ever holds more; None: where it is.

    ranks: "auto" is the default process group of torch.distributed, where it has several processes; another group; or
    None for a caller who reduces gradients. Each process (rank) has the whole model, or its rows of one that was given
    to `fully_shard` (FSDP2) before, and attaches it with the same settings; layer scores are those of rank 0. Gradients
    of what trains are averaged at the end of each backward, and so are the sketches that bases are made of within it,
    so that all ranks do the same step; what trained is compared at every switch. Ranks that differ all raise
    InputError. wire_dtype="bf16" rounds gradients on their way.
    Raises InputError, the model untouched, for anything that cannot work.
    """
    sharing = ranks_of(ranks)
    general: dict[str, Any] = {
        "block_size": block_size, "rounding": rounding, "max_grad_norm": max_grad_norm, "paging": paging
    }  # fmt: skip
    settings: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    try:
        with together(sharing):
            model = without_compiler(model)
            wire = _check(model, method, settings, general, wire_dtype, sharing)
            where = check_resting_where(resting_where, resting)
            resting = check_resting(resting, method, sharing is not None or bool(units_of(model)))
            folder = check_masters(masters, resting)
            awake = on_masters(active_on, resting, method)
            there = check_device(device, resting)
            at_rest(model)
            survey = survey_model(model, method, blocks)
        if sharing is not None:
            agree(sharing, model, method, {**settings, **general, "seed": seed, "wire_dtype": wire_dtype})
        if units_of(model):
            settle(model)
        losses = None
        if is_picked(resting) and calibration is not None:
            # It may be a stream, and is read twice.
            calibration = list(calibration)
            losses = measure_code_losses(model, raised_layers(survey), calibration, blocks_at_rest(survey), there)
        scores = _agreed_scores(sharing, survey, calibration, scores, there)
        reduction = None if sharing is None else GradientReduction(sharing, wire)
        kind = Sharing.BY_RANKS if sharing else Sharing.ALONE if ranks == "auto" else Sharing.BY_CALLER
        more = {**settings, **general, "keep_logits": keep_logits, "reduction": reduction, "sharing": kind}
        rest = None if resting is None else Rest(resting, where, awake, losses, there)
        optimizer = _attached(sharing, survey, scores, seed, more, rest, folder)
    except BaseException:
        if sharing is not None:
            sharing.close()
        raise
    _tell_what_differs(survey)
    return optimizer


def _attached(
    sharing: Ranks | None, survey: Survey, scores: Sequence[float] | None, seed: int, settings: Mapping[str, Any],
    rest: Rest | None, folder: str | None,
) -> SampledAdamW:  # fmt: skip
    """Do to the model what was surveyed; on a failure of this rank or another it is as it was."""
    optimizer: SampledAdamW | None = None
    layout: Layout | None = None
    moves = rest is not None and rest.device is not None
    before = next(survey.model.parameters()).device if moves else None
    swaps: list[Swap | TappedEmbedding] = []
    try:
        with together(sharing):
            sampler = _make_sampler(survey, seed, scores)
            masters = None if folder is None else Masters(survey, folder)
            layout = make_layout(survey, seed, rest, masters)
            swaps = layout.swaps
            kind: type[SampledAdamW] = survey.method.optimizer or SampledAdamW
            optimizer = kind(survey.model, survey.method, layout, sampler, seed=seed, **settings)
    except BaseException:
        if optimizer is not None:
            optimizer.detach()
        else:
            for swap in swaps:
                swap.undo()
            if before is not None:
                survey.model.to(before)
            for kept in () if layout is None else (layout.masters, layout.streamed):
                if kept is not None:
                    kept.close()
        raise
    return optimizer


def _check(
    model: nn.Module, method: Method, settings: Mapping[str, Any], general: Mapping[str, Any], wire_dtype: str | None,
    sharing: Ranks | None,
) -> torch.dtype | None:  # fmt: skip
    """Raise InputError for what cannot work whatever the model holds; returns the dtype of gradients on their way."""
    if not isinstance(method, Method):
        raise InputError(f"method is {method!r}; an instance such as OwLore(active_layers=5) is wanted.")
    check_attachable(model, sharing)
    check_hyper(dict(settings))
    check_settings(**general)
    return check_wire_dtype(wire_dtype)


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


def _agreed_scores(
    sharing: Ranks | None, survey: Survey, calibration: Iterable[Mapping[str, Tensor]] | None,
    given: Sequence[float] | None, device: torch.device | None,
) -> Sequence[float] | None:  # fmt: skip
    """Return the scores, of ranks those of rank 0: each has calibration batches of its own, and one draw is wanted."""
    if sharing is None or not units_of(survey.model):
        return on_first(sharing, lambda: _scores(survey, calibration, given, device))
    # A forward of one rank alone would wait for the others' weights.
    batches = None if calibration is None else list(calibration)
    sharing.check_alike({"the number of calibration batches": None if batches is None else len(batches)})
    with sharing.together():
        found = _scores(survey, batches, given, device)
    at_rest(survey.model)
    agreed: Sequence[float] | None = sharing.tell(found)[0]
    return agreed


def _scores(
    survey: Survey, calibration: Iterable[Mapping[str, Tensor]] | None, given: Sequence[float] | None,
    device: torch.device | None,
) -> Sequence[float] | None:  # fmt: skip
    """Return positive weights for the draw, as given to the method or to attach, or computed; None if none are used."""
    method, count = survey.method, len(survey.blocks)
    wanted = method.get("scores", None)
    if wanted in (None, "gradient-norm"):
        return None
    given = wanted if not isinstance(wanted, str) else given
    kind = method.score_kind()
    if given is None and kind is not None:
        return _positive(scores_of(kind, survey.model, survey.blocks, calibration, device), kind)
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
        warnings.warn(f"every {kind} score of this model is 0; its layers are drawn uniformly.", stacklevel=7)
        return [1.0] * len(scores)
    return [max(score, smallest) for score in scores]
