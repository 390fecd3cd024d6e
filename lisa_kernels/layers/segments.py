"""Attention of a transformers model among the tokens of each segment of one long row, without a mask of all pairs.

The batch carries the segments' borders in the place of a mask of four dimensions, which transformers hands on to the
model's attention as it is. Whether a model does that, and attends to nothing that borders do not tell, is asked by
small forwards, of models without values by what reaches their attention.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lisa_kernels.errors import InputError
from lisa_kernels.ops.capability import FIRST_WITH_BFLOAT16, capability
from lisa_kernels.ops.segment_attention import segment_attention

NAME = "lisa_kernels_segments"
# Of the probes: tokens of a segment, fewer than any window has.
TOKENS = 6
# Settings that some attention has beside its mask, each of which changes what it returns.
_UNKNOWN_HERE = ("softcap", "s_aux", "position_bias", "sinks")
_NOBODY: AbstractContextManager[Any] = nullcontext()
_REFUSED = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError, NotImplementedError)


def borders_mask(borders: Tensor) -> Tensor:
    """Return borders, int32 [segments + 1] from 0 to the number of tokens, as a batch carries them: attention_mask."""
    return borders.to(torch.int32)[None, None, None]


def attends_by_segments(model: nn.Module) -> bool:
    """Return whether the model's attention takes what `borders_mask` returns."""
    return _implementation(model) == NAME


def attend_by_segments(
    model: Any, longest: int, answers: AbstractContextManager[Any] = _NOBODY, device: torch.device | None = None
) -> bool:
    """Have the model's attention take borders, and return whether it does; if not, the model is as it was.

    longest: tokens of the longest segment there will be. answers: what answers for a model without values. device:
    where the model will compute, None: where it is. A model is left alone whose attention is not torch's
    `scaled_dot_product_attention`, or reaches less far back than that, or has dropout, a cap or anything else that
    borders do not tell; a GPU needs 16-bit weights and compute capability 8.0.
    Rows without borders are attended to as before.
    """
    if _implementation(model) not in ("sdpa", NAME) or not _has_kernel(next(model.parameters()), device):
        return False
    watch = _Watch()
    with torch.random.fork_rng(devices=[]), torch.no_grad(), answers:
        _register(watch.attend, watch.mask)
        fits = _switch(model, NAME) and _probe(model, watch)
    fits = fits and all(window >= longest for window in watch.windows)
    _register(_attend, _mask)
    return fits or not _switch(model, "sdpa")


def _implementation(model: Any) -> str | None:
    return getattr(getattr(model, "config", None), "_attn_implementation", None)


def _has_kernel(weight: Tensor, device: torch.device | None) -> bool:
    device = weight.device if device is None else device
    if device.type == "cuda":
        return weight.dtype != torch.float32 and capability(device) >= FIRST_WITH_BFLOAT16
    return device.type in ("cpu", "meta")


def _register(attend: Any, mask: Any) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, mask)


def _switch(model: Any, name: str) -> bool:
    try:
        model.set_attn_implementation(name)
    except _REFUSED:
        return False
    return _implementation(model) == name


def _probe(model: Any, watch: _Watch) -> bool:
    """Return whether two segments in one row come out as the two alone, and are told apart by their borders only."""
    weight, training = model.get_input_embeddings().weight, model.training
    ids = (torch.arange(2 * TOKENS, device=weight.device) * 7 + 3).remainder(weight.shape[0]).view(2, TOKENS)
    positions = torch.arange(TOKENS, device=weight.device).expand(2, TOKENS)
    both = {"input_ids": ids.view(1, -1), "position_ids": positions.reshape(1, -1), "use_cache": False}
    both["attention_mask"] = borders_mask(torch.arange(3, device=_borders_device(weight)) * TOKENS)
    try:
        # Of dropout nothing is seen in evaluation.
        model.train()(**both)
        model.eval()
        found = model(**both).logits
        alone = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    except (*_REFUSED, InputError):
        return False
    finally:
        model.train(training)
    if not watch.by_borders or watch.by_borders != 2 * watch.otherwise or not watch.plain or not watch.masks:
        return False
    if weight.is_meta:
        return True
    found, alone = found.view_as(alone).float(), alone.float()
    # rounding differs between a row and two; a visible neighbour changes the logits far more
    return bool((found - alone).norm() <= 0.01 * alone.norm())


def _borders_device(weight: Tensor) -> torch.device:
    # Without values they would not be borders.
    return torch.device("cpu") if weight.is_meta else weight.device


@dataclass
class _Watch:
    """What reaches a model's attention in a probe.

    by_borders, otherwise: calls of attention with borders and without. masks: calls for a mask. plain: whether all of
    these asked for an ordinary causal one; windows: how far back they let a token see.
    """

    by_borders: int = 0
    otherwise: int = 0
    masks: int = 0
    plain: bool = True
    windows: list[int] = field(default_factory=list)

    def attend(self, module: nn.Module, *given: Any, **settings: Any) -> tuple[Tensor, None]:
        """Attend as `_attend` does, and count."""
        if _are_borders(given[3] if len(given) > 3 else settings.get("attention_mask")):
            self.by_borders += 1
        else:
            self.otherwise += 1
        if settings.get("sliding_window") is not None:
            self.windows.append(int(settings["sliding_window"]))
        return _attend(module, *given, **settings)

    def mask(self, **asked: Any) -> Tensor | None:
        """Make the mask that is asked for, and note what it is."""
        self.masks += 1
        self.plain &= not asked.get("use_vmap", False) and asked.get("allow_is_causal_skip", True)
        if asked.get("local_size") is not None:
            self.windows.append(int(asked["local_size"]))
        return _mask(**asked)


def _mask(**asked: Any) -> Tensor | None:
    """Make the mask of rows without borders."""
    from transformers.masking_utils import sdpa_mask

    made: Tensor | None = sdpa_mask(**asked)
    return made


def _are_borders(mask: Any) -> bool:
    return isinstance(mask, Tensor) and mask.dtype == torch.int32 and mask.shape[:-1] == (1, 1, 1)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
    scaling: float | None = None, **settings: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attend as transformers asks: query [batch, heads, tokens, width]; returns [batch, tokens, heads, width]."""
    if attention_mask is None or not _are_borders(attention_mask):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        attended: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **settings
        )
        return attended
    causal = settings.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if dropout or not causal or any(settings.get(name) is not None for name in _UNKNOWN_HERE):
        raise InputError("this attention has dropout, a cap or sinks, or looks ahead; borders tell none of that.")
    if len(query) != 1:
        raise InputError(f"borders are those of one row, and {len(query)} rows are given.")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key, value = (part[0].transpose(0, 1) for part in (query, key, value))
    return segment_attention(query, key, value, attention_mask.flatten(), scale)[None], None
