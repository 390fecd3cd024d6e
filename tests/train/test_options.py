"""The options of a run: ranges, defaults that follow the model, and what a resumed run must share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from families import falcon, gpt2, llama, llava, mixtral

from lisa_kernels import InputError, LoRA, LoRAFA, OwLore
from lisa_kernels.methods import Method
from lisa_kernels.train.finetune import build_method
from lisa_kernels.train.options import FineTuneOptions


def _options(**values: Any) -> FineTuneOptions:
    return FineTuneOptions(**{"model": "preset:tiny", "data": "stdlib", "output": Path("out"), **values})


@pytest.mark.parametrize(
    ("name", "value"),
    [("batch_size", 0), ("accumulate", 0), ("seq_len", 1), ("steps", 0), ("epochs", -1.0), ("lr", 0.0),
     ("eval_fraction", 0.6), ("max_grad_norm", -1.0), ("save_every", -1), ("rank", 0),
     ("active_layers", 0), ("period", 0), ("warmup_steps", -1)],
)  # fmt: skip
def test_values_out_of_range_are_refused(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=name.replace("_", ".")):
        _options(**{name: value})


def test_only_what_is_given_replaces_the_methods_defaults() -> None:
    assert _options(period=7).build_method() == OwLore(period=7)


def test_default_rank_and_layers_shrink_to_the_model_but_given_ones_do_not() -> None:
    method = _options(method="owlore").build_method(default_rank=8, layers=3)
    assert (method.get("rank", 0), method.get("active_layers", 0)) == (8, 3)
    method = _options(rank=64, active_layers=4).build_method(default_rank=8, layers=3)
    assert (method.get("rank", 0), method.get("active_layers", 0)) == (64, 4)
    assert _options().build_method(default_rank=8) == LoRA(rank=8, embeddings="low-rank")


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (None, "all-linear"),
        ("all-linear", "all-linear"),
        ("q_proj", ("q_proj",)),
        ("q_proj,v_proj", ("q_proj", "v_proj")),
    ],
    ids=str,
)
def test_targets_are_names_with_commas_between(given: Any, wanted: Any) -> None:
    assert _options(method="lora-fa", targets=given).build_method() == LoRAFA(targets=wanted)


def test_a_name_left_empty_and_targets_of_another_method_are_refused() -> None:
    with pytest.raises(InputError, match="targets"):
        _options(method="lora-fa", targets="q_proj,")
    with pytest.raises(InputError, match="'owlore' has no setting 'targets'"):
        _options(method="owlore", targets="q_proj")


def test_where_state_rests_is_told_by_names() -> None:
    assert _options(retired_state="page").build_method() == OwLore(retired_state="page")
    for given, words in [
        ({"paging": "hots"}, "did you mean 'host'"), ({"paging": "file:"}, "name the folder"),
        ({"retired_state": "pag"}, "did you mean 'page'"),
        ({"retired_state": "page", "method": "galore"}, "'galore' has no setting 'retired_state'"),
    ]:  # fmt: skip
        with pytest.raises(InputError, match=words):
            _options(**given)


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ({}, LoRA(embeddings="low-rank")),
        ({"rank": 8, "targets": "q_proj"}, LoRA(rank=8, targets="q_proj", embeddings="low-rank")),
        ({"embeddings": "frozen"}, LoRA()),
        ({"method": "lora"}, LoRA()),
        ({"active_layers": 3}, OwLore(3)),
        ({"scores": "uniform", "rank": 8}, OwLore(rank=8, scores="uniform")),
        ({"embeddings": "always"}, OwLore(embeddings="always")),
        ({"embeddings": "with-first-block"}, OwLore(embeddings="with-first-block")),
    ],
)
def test_the_method_follows_where_it_is_not_given(given: dict[str, Any], taken: Method) -> None:
    """And a run that is repeated from what was recorded takes the same."""
    options = _options(**given)
    assert options.build_method() == taken
    again = FineTuneOptions(**{**options.recorded(), "output": Path("out")})
    assert again == options
    assert again.build_method() == taken


def test_auto_is_what_is_not_given() -> None:
    given = _options(lr="auto", period="auto", warmup_steps="auto")
    assert given == _options()
    assert (given.lr, given.period, given.warmup_steps) == (None, None, None)


def test_where_it_writes_is_not_part_of_what_it_computes() -> None:
    assert _options(output=Path("a"), save_every=3).fixed() == _options(output=Path("b"), resume=True).fixed()
    assert _options(paging="host").fixed() == _options(paging="file:pages").fixed()
    assert _options(lr=1.0).fixed() != _options(lr=2.0).fixed()


@pytest.mark.parametrize(
    ("make", "name"), [(llama, "lora"), (gpt2, "lora"), (mixtral, "owlore"), (falcon, "owlore"), (llava, "owlore")]
)
def test_the_method_that_is_not_given_trains_the_whole_decoder(make: Callable[[], Any], name: str) -> None:
    """Experts and layers that no adapter reaches train in another method, and none stands in a tower of images."""
    assert build_method(_options(), make()).name == name
    assert build_method(_options(method="lisa"), make()).name == "lisa"
