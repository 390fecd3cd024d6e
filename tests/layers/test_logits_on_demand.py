"""An output whose logits wait gives them in every form that transformers' outputs have, and forms none before."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from operator import itemgetter
from typing import Any

import pytest
import torch
from accelerate.utils import convert_to_fp32
from families import DECODERS, llama, tokens
from torch import Tensor
from torch.utils import _pytree

from lisa_kernels.layers import leave_out_logits
from lisa_kernels.layers.logits_on_demand import can_form_on_demand, form_logits_on_demand

READERS: dict[str, Callable[[Any], Tensor]] = {
    "attribute": lambda out: out.logits,
    "getattr of every field": lambda out: [getattr(out, field.name) for field in dataclasses.fields(out)][1],
    "key": lambda out: out["logits"],
    "position": lambda out: out[1],
    "position from the end": lambda out: out[-2],
    "slice": lambda out: out[:2][1],
    "slice without the loss": lambda out: out[1:][0],
    "itemgetter": lambda out: itemgetter("loss", "logits")(out)[1],
    "get": lambda out: out.get("logits"),
    "get with a default": lambda out: out.get("logits", None),
    "items": lambda out: dict(out.items())["logits"],
    "values": lambda out: list(out.values())[1],
    "dict": lambda out: dict(out)["logits"],
    "unpacked as keywords": lambda out: {**out}["logits"],
    "to_tuple": lambda out: out.to_tuple()[1],
    "popitem": lambda out: [out.popitem(), out.popitem()][1][1],
    "pickled": lambda out: pickle.loads(pickle.dumps(out)).logits,
    "copied": lambda out: copy.copy(out)["logits"],
    "copied as a mapping": lambda out: out.copy()["logits"],
    "replaced": lambda out: dataclasses.replace(out, loss=None).logits,
    "made anew of pairs": lambda out: type(out)(dict(out)).logits,
    "made anew of keywords": lambda out: type(out)(**out)["logits"],
    "a tree": lambda out: _pytree.tree_map(lambda value: value, out)["logits"],
    "accelerate's conversion": lambda out: convert_to_fp32(out)["logits"],
    "in place": lambda out: out.logits.mul_(1.0) + 0 * out["logits"],
}


class Output:
    """An output of transformers with three values, which counts how often its logits are formed."""

    def __init__(self) -> None:
        from transformers.modeling_outputs import CausalLMOutputWithPast

        self.formed = 0
        self.wanted = torch.arange(6.0).view(1, 2, 3)
        self.cls = CausalLMOutputWithPast
        plain = CausalLMOutputWithPast(loss=torch.ones(()), logits=torch.zeros(1, 1, 3), hidden_states=(torch.ones(2),))
        self.output = form_logits_on_demand(plain, self.form)

    def form(self) -> Tensor:
        self.formed += 1
        return self.wanted.clone()


@pytest.mark.parametrize("way", READERS)
def test_every_way_to_read_gives_the_logits(way: str) -> None:
    """They are formed once, and the output is one of the model's own class from then on."""
    made = Output()
    assert isinstance(made.output, made.cls)
    assert torch.equal(READERS[way](made.output), made.wanted)
    assert made.formed == 1
    assert type(made.output) is made.cls
    if way != "popitem":
        assert torch.equal(made.output.logits, made.wanted)
        assert vars(made.output).keys() == {field.name for field in dataclasses.fields(made.cls)}
    assert made.formed == 1


def test_reading_anything_else_forms_nothing() -> None:
    """The loss in every form, keys, lengths and membership; the order of keys is a plain output's."""
    made = Output()
    out = made.output
    for loss in (out.loss, out["loss"], out[0], out[:1][0], out.get("loss"), out[-3]):
        assert loss.item() == 1.0
    assert out.hidden_states is out[2] is out["hidden_states"]
    assert list(out) == list(out.keys()) == ["loss", "logits", "hidden_states"]
    assert "logits" in out
    assert "past_key_values" not in out
    assert out.get("past_key_values", 5) == 5
    assert len(out) == 3
    with pytest.raises(KeyError):
        out["past_key_values"]
    with pytest.raises(IndexError):
        out[3]
    out.loss = torch.zeros(())
    assert out["loss"].item() == out[0].item() == 0.0
    assert made.formed == 0


@pytest.mark.parametrize("way", ["attribute", "key"])
def test_logits_of_the_readers_own_take_their_place(way: str) -> None:
    """Set before they were read, they are what is there; none are formed."""
    made = Output()
    own = torch.ones(4)
    if way == "attribute":
        made.output.logits = own
    else:
        made.output["logits"] = own
    assert made.output.logits is made.output["logits"] is made.output[1] is own
    assert made.formed == 0
    assert type(made.output) is made.cls


def test_equality_and_text_are_a_plain_outputs() -> None:
    made = Output()
    assert repr(made.output) == repr(made.cls(loss=torch.ones(()), logits=made.wanted, hidden_states=(torch.ones(2),)))
    assert Output().output != Output().cls()


@pytest.mark.parametrize("name", ["llama", "mixtral", "llava"])
def test_a_models_output_has_its_own_keys_and_values(name: str) -> None:
    """Experts' losses, images' states and caches stand where they stand in the plain model's output."""
    plain = DECODERS[name].make()
    model = copy.deepcopy(plain)
    assert leave_out_logits(model) is not None
    asked = {"output_router_logits": True} if name == "mixtral" else {"output_hidden_states": True}
    output, wanted = model(**tokens(), **asked), plain(**tokens(), **asked)
    assert list(output) == list(wanted)
    assert len(output) == len(wanted) == len(output[:])
    for key in wanted:
        if isinstance(wanted[key], Tensor):
            torch.testing.assert_close(output[key], wanted[key], rtol=1e-5, atol=1e-5)
    assert type(output) is type(wanted)


def test_what_is_no_output_of_transformers_is_told_apart() -> None:
    """A mapping of another kind, or an output without logits, is left to the model."""
    from transformers.modeling_outputs import BaseModelOutput

    assert can_form_on_demand(llama()(**tokens()))
    assert not can_form_on_demand({"loss": torch.ones(()), "logits": torch.ones(1)})
    assert not can_form_on_demand(BaseModelOutput(last_hidden_state=torch.ones(1)))
    assert not can_form_on_demand((torch.ones(1),))
