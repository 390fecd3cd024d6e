"""What is frozen stays frozen, and re-entrant checkpointing is refused."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from families import llama, tokens
from torch import nn

from lisa_kernels.errors import InputError
from lisa_kernels.layers import FreezeGuard, check_attachable
from lisa_kernels.layers.freezing import Known


def flags(model: nn.Module) -> dict[str, bool]:
    return {name: param.requires_grad for name, param in model.named_parameters()}


def test_flags_changed_by_others_are_put_back_with_one_warning() -> None:
    """Whatever is switched on or off between forwards is as the guard wants it in the next one."""
    model = llama()
    guard = FreezeGuard(model)
    guard.set_trainable(model, model.model.layers[1].parameters())
    wanted = flags(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for value in (True, False):
            model.requires_grad_(value)
            model(**tokens())
            assert flags(model) == wanted
    assert len([w for w in caught if "outside the sampler" in str(w.message)]) == 1


def test_nothing_is_said_when_nothing_was_changed() -> None:
    """An ordinary forward warns of nothing."""
    model = llama()
    guard = FreezeGuard(model)
    guard.set_trainable(model, model.model.layers[1].parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**tokens())


def test_gradients_of_frozen_parameters_are_dropped() -> None:
    """A gradient that slipped through would move a frozen weight and hold memory."""
    model = llama()
    guard = FreezeGuard(model)
    guard.set_trainable(model, model.parameters())
    model(**tokens()).loss.backward()
    guard.set_trainable(model, model.model.layers[1].parameters())
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        f"model.layers.1.{name}" for name, _ in model.model.layers[1].named_parameters()
    }


def test_removing_gives_back_the_flags_of_before() -> None:
    """Frozen parameters stay frozen and trainable ones trainable, as the user had them."""
    model = llama()
    model.model.layers[0].requires_grad_(False)
    before = flags(model)
    guard = FreezeGuard(model)
    guard.set_trainable(model, [])
    assert not any(flags(model).values())
    guard.remove(model)
    assert flags(model) == before
    assert not model._forward_pre_hooks


def enable_twice(model: Any) -> None:
    model.gradient_checkpointing_enable()
    model.gradient_checkpointing_enable()


def peft_like(model: Any) -> None:
    def make_inputs_require_grad(module: Any, inputs: Any, output: torch.Tensor) -> None:
        output.requires_grad_(True)

    model.get_input_embeddings().register_forward_hook(make_inputs_require_grad)


def enable(model: Any) -> None:
    model.enable_input_require_grads()


@pytest.mark.parametrize("install", [enable, enable_twice, peft_like])
def test_hooks_that_make_embeddings_require_gradients_go(install: Any) -> None:
    """However they came and however often, after one forward the embeddings' output needs no gradient."""
    model = llama()
    guard = FreezeGuard(model)
    guard.set_trainable(model, model.model.layers[2].parameters())
    install(model)
    seen: list[bool] = []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].requires_grad))
    model(**tokens())
    assert seen == [False]


def test_hooks_of_the_user_on_the_embeddings_stay() -> None:
    """Only the gradient hooks are removed."""
    model = llama()
    seen: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: seen.append(1))
    FreezeGuard(model).set_trainable(model, [])
    model(**tokens())
    assert seen == [1]


def test_reentrant_checkpointing_is_refused_at_attach_and_at_forward() -> None:
    """Switched on before or after, the reason and the right call are named."""
    model = llama()
    guard = FreezeGuard(model)
    guard.set_trainable(model, model.model.layers[2].parameters())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(InputError, match=r"re-entrant.*use_reentrant.*False"):
        model(**tokens())
    guard.remove(model)
    with pytest.raises(InputError, match="re-entrant"):
        check_attachable(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={})
    with pytest.raises(InputError, match="re-entrant"):
        check_attachable(model)
    model.gradient_checkpointing_disable()
    check_attachable(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    check_attachable(model)


def test_a_parameter_moved_after_the_first_step_is_told() -> None:
    """Its moments would stay behind; before the first step it may go where it likes."""
    here, there = (nn.Parameter(torch.empty(2, device=device)) for device in ("cpu", "meta"))
    known = Known("w", here.shape, here.dtype)
    assert known.change("w", there) is None
    assert known.change("w", there) is None
    assert known.change("w", here) == "w is on cpu and was on meta"
