"""Models by preset, folder, file and configuration, none of which takes memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from plan.small_runs import config

from lisa_kernels.errors import InputError
from lisa_kernels.train.empty_model import empty_model


def test_a_7b_model_is_made_of_shapes() -> None:
    """All parameters and buffers are on the meta device, in the dtype asked for, ready to train."""
    model = empty_model("preset:llama-2-7b", "bf16")
    assert all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert {param.dtype for param in model.parameters()} == {torch.bfloat16}
    assert sum(param.numel() for param in model.parameters()) == 6_738_415_616
    assert model.training
    assert not model.config.use_cache


def test_a_folder_a_file_and_a_configuration_give_the_same_model(tmp_path: Path) -> None:
    """No weights need to be there."""
    given = config("qwen2")
    given.save_pretrained(tmp_path)
    made = [empty_model(spec, "fp32") for spec in (given, str(tmp_path), str(tmp_path / "config.json"))]
    shapes = [{name: tuple(param.shape) for name, param in model.named_parameters()} for model in made]
    assert shapes[0] == shapes[1] == shapes[2]


def test_the_configuration_given_stays_as_it_is() -> None:
    """A plan changes nothing that its caller holds."""
    given = config("llama")
    before = given.to_dict()
    empty_model(given, "bf16")
    assert given.to_dict() == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model_type": "no-such-model"}, "no-such-model"),
        ({"model_type": "clip"}, "causal"),
        ("{", "config"),
        ({}, "model_type"),
    ],
    ids=["unknown", "not-causal", "broken", "empty"],
)
def test_a_configuration_that_is_of_no_language_model(content: object, message: str, tmp_path: Path) -> None:
    """One clear error each."""
    path = tmp_path / "config.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InputError, match=message):
        empty_model(str(path), "bf16")


@pytest.mark.parametrize("spec", ["preset:llama-2-7", "llama-2-7b", "./nowhere", ""], ids=repr)
def test_a_model_that_is_not_there(spec: str) -> None:
    """A misspelt preset, a preset without its prefix, a path that does not exist, nothing."""
    with pytest.raises(InputError):
        empty_model(spec, "bf16")


def test_a_folder_without_a_configuration(tmp_path: Path) -> None:
    """It says what is missing."""
    with pytest.raises(InputError, match=r"no config\.json"):
        empty_model(str(tmp_path), "bf16")
