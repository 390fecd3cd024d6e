"""The training loss of an attached language model, computed from what its output layer reads: logits never exist."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from lisa_kernels.distributed import at_rest, is_sharded, is_unit
from lisa_kernels.errors import InputError
from lisa_kernels.layers.blocks import output_layer
from lisa_kernels.layers.linears import is_linear, linear_shape
from lisa_kernels.layers.logits_on_demand import can_form_on_demand, form_logits_on_demand
from lisa_kernels.layers.loss_probe import IGNORED, MISFITS, PROBED_TOKENS, Probe, is_plain_loss
from lisa_kernels.layers.lowrank import LowRankLinear
from lisa_kernels.layers.resting import RestingLinear
from lisa_kernels.ops.autocast import autocast_dtype
from lisa_kernels.ops.linear_cross_entropy import Curve, Head, linear_cross_entropy
from lisa_kernels.ops.resting import RestingWeight
from lisa_kernels.uncompiled import uncompiled

PLAIN = Curve()


def causal_loss(
    hidden: Tensor, layer: nn.Module, labels: Tensor, num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = IGNORED, shift_labels: Tensor | None = None, curve: Curve = PLAIN, none_is_zero: bool = False,
) -> Tensor:  # fmt: skip
    """Return the mean cross entropy of the next tokens, float32 0-d, without logits.

    hidden: [..., T, n], what the output layer `layer` reads. labels: [..., T], the tokens themselves;
    shift_labels: the next ones, where they are known. num_items_in_batch: what to divide the sum by, else the number
    of labels that count. curve: what the model makes of the layer's logits. none_is_zero: of no labels at all, in the
    place of a NaN.
    """
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    head = head_of(layer)._replace(curve=curve)
    hidden = hidden.to(head.weight.device)
    # Labels on the CPU stay there: which of them count is known to the host then.
    targets = shift_labels if shift_labels.device.type == "cpu" else shift_labels.to(head.weight.device)
    refresh = layer.refresh_basis if isinstance(layer, LowRankLinear) and layer.capturing else None
    total = linear_cross_entropy(hidden, head, targets, ignore_index=ignore_index, refresh=refresh)
    if num_items_in_batch is None:
        # One number of the CPU is an argument of the division and no copy.
        return total / (targets != ignore_index).sum().clamp_min(int(none_is_zero))
    return total / (
        num_items_in_batch.to(total.device) if isinstance(num_items_in_batch, Tensor) else num_items_in_batch
    )


def head_of(layer: nn.Module) -> Head:
    """Return what the loss needs of an output layer."""
    if not isinstance(layer, LowRankLinear):
        return Head(layer.weight, layer.bias)  # type: ignore[arg-type]
    weight: Tensor | RestingWeight = layer.resting if isinstance(layer, RestingLinear) else layer.matrix
    if not layer.active:
        return Head(weight, layer.bias)
    # One that rests is settled before a basis is found, and not after each step.
    is_zero = layer.capturing if isinstance(weight, RestingWeight) else layer.tracker is not None
    return Head(weight, layer.bias, layer.slot, layer.basis, layer.scale, is_zero)


@dataclass
class Forward:
    """A forward under way whose loss is computed here: what its output layer would have read, under which autocast."""

    hidden: Tensor | None = None
    autocast: torch.dtype | None = None


class LossWithoutLogits:
    """Hooks on a transformers model with which its loss, in training, is computed a few hundred tokens at a time.

    When labels are given, gradients are on and the model is in training mode, the output layer sees one position only;
    the model's loss function gets the hidden states that the layer would have read. What else the model adds to its
    loss stays. Logits are formed when they are read from the model's output; evaluation and generation are as before,
    unless `in_evaluation` is set.

    none_is_zero: where ranks train together a batch without labels has the loss 0 and adds nothing; else a NaN, as the
    model's own.
    """

    in_evaluation = False
    none_is_zero = False

    def __init__(self, model: nn.Module, layer: nn.Module) -> None:
        self.model, self.layer = model, layer
        self.plain: Callable[..., Tensor] = model.loss_function  # type: ignore[assignment]
        self._own = model.__dict__.get("_loss_function")
        self._names = list(inspect.signature(model.forward).parameters)
        self.curve = PLAIN
        self._probe: Probe | None = None
        # By thread, each of which may run the model.
        self._forwards: dict[int, Forward] = {}
        model.loss_function = self._loss  # type: ignore[assignment]
        self._handles = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            layer.register_forward_pre_hook(self._narrow),
            layer.register_forward_hook(self._set_apart),
            model.register_forward_hook(self._end, always_call=True),
        ]

    def remove(self) -> None:
        """Take the hooks off and give the model its loss function back."""
        for handle in self._handles:
            handle.remove()
        del self.model._loss_function
        if self._own is not None:
            self.model.loss_function = self._own

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        given = {**dict(zip(self._names, args)), **kwargs}
        keep = given.get("logits_to_keep", 0)
        as_asked = given.get("return_dict")
        by_name = getattr(model.config, "return_dict", True) if as_asked is None else as_asked
        wanted = given.get("labels") is not None and by_name
        whole = isinstance(keep, int) and keep == 0
        training = model.training and torch.is_grad_enabled()
        armed = wanted and whole and (training or self.in_evaluation or self._probe is not None)
        self._begun(Forward() if armed else None)

    @uncompiled
    def _begun(self, forward: Forward | None) -> None:
        self._forwards.pop(get_ident(), None)
        if forward is not None:
            self._forwards[get_ident()] = forward

    @uncompiled
    def _under_way(self) -> Forward | None:
        return self._forwards.get(get_ident())

    def _narrow(self, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor] | None:
        forward = self._under_way()
        if forward is None:
            return None
        (hidden,) = args
        forward.hidden, forward.autocast = hidden, autocast_dtype(hidden.device.type)
        if self._probe is not None:
            return (self._probe.positions(head_of(layer), hidden),)
        return (hidden[..., :1, :],)

    def _set_apart(self, layer: nn.Module, args: Any, logits: Tensor) -> Tensor | None:
        """Take the logits of the one position out of the graph: no gradient goes through them."""
        forward = self._under_way()
        return None if forward is None or self._probe is not None else logits.detach()

    def _loss(self, *args: Any, **kwargs: Any) -> Tensor:
        forward = self._under_way()
        if forward is None or forward.hidden is None:
            return self.plain(*args, **kwargs)
        if self._probe is not None:
            return self._probe.compare(*args, **kwargs)
        return self._chunked(forward.hidden, *args, **kwargs)

    def _chunked(
        self, hidden: Tensor, logits: Tensor, labels: Tensor, vocab_size: int | None = None,
        num_items_in_batch: Tensor | int | None = None, ignore_index: int = IGNORED,
        shift_labels: Tensor | None = None, **others: Any,
    ) -> Tensor:  # fmt: skip
        settings = num_items_in_batch, ignore_index, shift_labels, self.curve, self.none_is_zero
        return causal_loss(hidden, self.layer, labels, *settings)

    def _end(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        forward = self._under_way()
        self._begun(None)
        # There is no output where the forward raised.
        if output is None or forward is None or forward.hidden is None or self._probe is not None:
            return None
        return form_logits_on_demand(output, partial(self._logits, forward.hidden, forward.autocast))

    def _logits(self, hidden: Tensor, autocast: torch.dtype | None) -> Tensor:
        """Return the logits as the forward would have formed them: in its graph, under its autocast."""
        if any(map(is_sharded, self.layer.parameters())):
            raise InputError(
                "the logits are read after the forward, when the output layer's weight is shared out again; let the "
                "model keep it: fully_shard(model, reshard_after_forward=False), or attach with keep_logits=True."
            )
        with torch.autocast(hidden.device.type, dtype=autocast) if autocast else nullcontext():
            logits: Tensor = self.layer(hidden)
        if self.curve.cap is not None:
            return self.curve.cap * torch.tanh(logits * (self.curve.scale / self.curve.cap))
        return logits if self.curve.scale == 1.0 else logits * self.curve.scale

    @torch.no_grad()
    def is_exact(self) -> bool:
        """Return whether the model's loss is the cross entropy of its output layer's logits, scaled and capped or not.

        Runs a forward of a few tokens and notes the curve.
        """
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        self._probe = Probe(self.model)
        weight = self.layer.weight
        assert isinstance(weight, Tensor)
        stand_in = self.layer.register_forward_hook(self._probe.stand_in) if weight.is_meta else None
        try:
            ids = torch.arange(PROBED_TOKENS).unsqueeze(0)
            device = self.layer.device if isinstance(self.layer, LowRankLinear) else weight.device
            labels = ids if weight.is_meta else ids.to(device)
            output = self.model(input_ids=ids.to(device), labels=labels)
            found = self._probe.curves
            if not can_form_on_demand(output) or len(found) != 1 or found[0] is None:
                return False
            self.curve = found[0]
            return True
        except MISFITS:
            return False
        finally:
            self._probe = None
            if stand_in is not None:
                stand_in.remove()
            for module, mode in modes:
                module.training = mode


def leave_out_logits(model: nn.Module) -> LossWithoutLogits | None:
    """Compute the model's training loss without logits from now on; None, the model as it was, where that is not exact.

    It is for models of transformers with an output layer, whose loss is the cross entropy of what this layer returns,
    scaled or softly capped by numbers of their configuration. Warns of models with an output layer and another loss.
    """
    layer = output_layer(model)
    has_loss = isinstance(getattr(type(model), "loss_function", None), property)
    if not has_loss or layer is None or not (isinstance(layer, LowRankLinear) or is_linear(layer)):
        return None
    if is_unit(layer):
        # Its weight is there in its own forward only.
        warnings.warn(
            "the output layer is under fully_shard by itself, so that the loss forms the logits of all tokens; share "
            "it out with what is around the blocks.",
            stacklevel=4,
        )
        return None
    if is_plain_loss(model.loss_function, linear_shape(layer)[0]):  # type: ignore[arg-type]
        without = LossWithoutLogits(model, layer)
        exact = without.is_exact()
        at_rest(model)
        if exact:
            return without
        without.remove()
    warnings.warn(
        f"the loss of {type(model).__name__} is not the cross entropy of the next tokens by its output layer; it goes "
        "on forming the logits of all tokens.",
        stacklevel=4,
    )
    return None
