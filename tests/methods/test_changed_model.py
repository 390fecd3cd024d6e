"""A model that is changed after attaching is refused at the next step, before anything trains wrongly or not at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import changed, llama, snapshot, tokens, train
from torch import nn

from lisa_kernels import LISA, FullFineTune, InputError, LoRAFA, OwLore, attach
from lisa_kernels.methods import Method

METHODS: dict[str, Method] = {
    "lisa": LISA(active_layers=2, period=1),
    "owlore": OwLore(active_layers=2, period=1, rank=4, scores="uniform"),
    "lora-fa": LoRAFA(rank=4),
    "full": FullFineTune(),
}


def resize(model: Any) -> None:
    model.resize_token_embeddings(70)


def shrink(model: Any) -> None:
    model.resize_token_embeddings(40)


def append_layer(model: Any) -> None:
    layer = llama().model.layers[0]
    layer.self_attn.layer_idx = 3
    model.model.layers.append(layer)
    model.config.num_hidden_layers = 4


def drop_layer(model: Any) -> None:
    model.model.layers = model.model.layers[:2]


def swap_layers(model: Any) -> None:
    model.model.layers = nn.ModuleList(reversed(model.model.layers))


def replace_layer(model: Any) -> None:
    model.model.layers[1] = llama().model.layers[1]


def replace_head(model: Any) -> None:
    model.lm_head = nn.Linear(32, 61, bias=False)


def replace_linear(model: Any) -> None:
    model.model.layers[0].mlp.up_proj = nn.Linear(32, 48, bias=False)


def tie(model: Any) -> None:
    model.lm_head.weight = model.model.embed_tokens.weight


def load_by_assignment(model: Any) -> None:
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)


def add_adapters(model: Any) -> None:
    from peft import LoraConfig

    model.add_adapter(LoraConfig(r=8, target_modules=["q_proj"]))


def add_parameter(model: Any) -> None:
    model.model.extra = nn.Parameter(torch.zeros(3))


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "embeddings resized": (resize, r"embed_tokens\.weight is \[70, 32\] and was \[61, 32\] when|is another parameter"),
    "embeddings cut": (shrink, r"embed_tokens\.weight is \[40, 32\] and was \[61, 32\] when|is another parameter"),
    "a layer more": (append_layer, r"model\.layers\.3\..* is new, it was not there when the model was attached"),
    "a layer less": (drop_layer, r"model\.layers\.2\..* is gone from the model since it was attached"),
    "layers in another order": (swap_layers, r"the parameter model\.layers\.0\..* was model\.layers\.2"),
    "another layer": (replace_layer, r"model\.layers\.1\..* is another parameter than when the model was attached"),
    "another head": (replace_head, r"lm_head\.weight is another parameter"),
    "another linear": (replace_linear, r"mlp\.up_proj\.weight is another parameter"),
    "embedding and head tied": (tie, r"lm_head\.\w+ is gone from the model"),
    "weights loaded by assignment": (load_by_assignment, "is another parameter"),
    "adapters added": (add_adapters, r"lora_A.* is new|base_layer\.\w+ is new|the parameter .*base_layer"),
    "a parameter added": (add_parameter, r"model\.extra is new"),
    "half precision": (lambda model: model.half(), r"holds torch\.float16 and held torch\.float32"),
    "bfloat16": (lambda model: model.to(torch.bfloat16), r"holds torch\.bfloat16 and held torch\.float32"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("method", METHODS)
def test_a_changed_model_is_refused_in_one_sentence(method: str, change: str) -> None:
    """At the next forward in training, and at the step of an optimizer whose backward came before."""
    make, message = CHANGES[change]
    model = llama()
    optimizer = attach(model, METHODS[method], lr=1e-2)
    model(**tokens()).loss.backward()
    make(model)
    with pytest.raises(InputError, match=message) as caught:
        optimizer.step()
    assert str(caught.value).endswith("call detach() on its optimizer, change the model, and attach it again.")
    before = snapshot(model)
    with pytest.raises(InputError, match=message):
        model(**tokens())
    assert not changed(model, before)


@pytest.mark.parametrize("change", ["embeddings resized", "another head", "another linear", "a layer more", "bfloat16"])
@pytest.mark.parametrize("method", ["lisa", "owlore"])
def test_detached_the_changed_model_stays_as_it_is_and_can_be_attached(method: str, change: str) -> None:
    """What others put in stays in; attached again, all of it trains."""
    model = llama()
    optimizer = attach(model, METHODS[method], lr=1e-2)
    train(model, optimizer, tokens())
    CHANGES[change][0](model)
    modules = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    optimizer.detach()
    assert all(model.get_submodule(name) is module for name, module in modules.items())
    assert not any(name.endswith(".slot") for name, _ in model.named_parameters())
    before = snapshot(model)
    again = attach(model, METHODS[method], lr=1e-2)
    for step in range(10):
        train(model, again, tokens(seed=step))
    assert changed(model, before) == before.keys()


def test_a_model_in_evaluation_is_not_asked() -> None:
    """Whoever changes it to generate or to save may go on with that."""
    model = llama()
    attach(model, METHODS["owlore"])
    model.resize_token_embeddings(70)
    model.eval()
    assert model(**tokens()).logits.shape[-1] == 70


def test_tying_again_what_is_tied_changes_nothing() -> None:
    """transformers ties weights at many moments."""
    for method in METHODS.values():
        model = llama(tied=True)
        optimizer = attach(model, method, lr=1e-2)
        model.tie_weights()
        train(model, optimizer, tokens())
