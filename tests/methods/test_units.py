"""Parameters are sorted into units that train as a whole."""

from __future__ import annotations

import pytest
from families import DECODERS, llama

from lisa_kernels import LISA, GaLore, OwLore, attach
from lisa_kernels.errors import InputError
from lisa_kernels.methods.survey import survey_model
from lisa_kernels.methods.units import make_layout


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("embeddings", ["always", "low-rank", "with-first-block", "frozen", "sampled"])
def test_every_language_parameter_is_in_one_unit(name: str, embeddings: str) -> None:
    """Weights under slots, full parameters and what stands around: each once; nothing of other towers."""
    family = DECODERS[name]
    model = family.make()
    wanted = {
        id(param): key
        for key, param in model.named_parameters()
        if not key.startswith(family.foreign or ("-",))
        and (embeddings != "frozen" or key not in {*family.embeddings, *family.head})
    }
    layout = make_layout(survey_model(model, OwLore(active_layers=1, rank=4, embeddings=embeddings)))
    found = [id(param) for unit in layout.units() for param in unit.full]
    found += [id(layer.weight) for unit in layout.units() for layer in unit.lowrank.values()]
    assert len(found) == len(set(found))
    assert {wanted.get(key, "foreign") for key in found} == set(wanted.values())
    extra = (
        0
        if embeddings != "sampled"
        else 1
        if name in ("llama-tied", "qwen2", "gemma2", "gemma3", "gpt2", "falcon")
        else 2
    )
    assert len(layout.drawn) == 3 + extra


def test_low_rank_layers_that_share_a_weight_are_refused_with_the_reason() -> None:
    """Two modules, one parameter: the slot of the one would miss the other's gradient. At full rank it trains."""
    model = llama()
    first, second = (block.mlp for block in model.model.layers[:2])
    second.up_proj.weight = first.up_proj.weight
    reason = r"model\.layers\.0\.mlp\.up_proj is tied to that of model\.layers\.1\.mlp\.up_proj, whose gradient"
    with pytest.raises(InputError, match=reason):
        attach(model, GaLore(rank=4))
    attach(model, LISA(active_layers=1, embeddings="frozen"))
