"""A model on the second device while the first is current; one that is spread over both is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import DECODERS

from device.training import METHODS, batch, train
from lisa_kernels import attach
from lisa_kernels.errors import InputError


def spread(family: str) -> Any:
    """Return a model with blocks on two devices, as `device_map="auto"` leaves it."""
    from accelerate import dispatch_model

    model = DECODERS[family].make().to(torch.bfloat16)
    last = model.config.num_hidden_layers - 1
    blocks = {f"model.layers.{number}": int(number == last) for number in range(last + 1)}
    head = 0 if model.config.tie_word_embeddings else 1
    around = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": head}
    return dispatch_model(model, {**around, **blocks})


@pytest.mark.parametrize("method", ["owlore-page", "ows-adaptive", "galore"])
def test_a_model_on_the_second_device_trains_as_on_the_first(method: str) -> None:
    """Nothing is made on the current device, which is another: all bits are equal."""
    first = train("llama", METHODS[method], "cuda:0", torch.bfloat16, max_grad_norm=1.0)
    second = train("llama", METHODS[method], "cuda:1", torch.bfloat16, max_grad_norm=1.0)
    assert torch.cuda.current_device() == 0
    assert first.losses == second.losses
    assert all(torch.equal(value, second.after[name]) for name, value in first.after.items())


@pytest.mark.order("late")
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_model_spread_over_two_devices_is_refused(family: str) -> None:
    """In one sentence, embeddings tied or not, and the model is as it was."""
    model = spread(family)
    with pytest.raises(InputError, match="spread over 0, 1 by its device_map"):
        attach(model, METHODS["owlore-low-rank"], lr=1e-2)
    assert torch.isfinite(model(**batch("cuda:0", 0)).loss)
