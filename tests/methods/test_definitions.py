"""Methods are plain records that check their settings."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lisa_kernels import LISA, OWS, BAdam, GaLore, InputError, LoRAFA, OwLore
from lisa_kernels.methods import METHODS, method_by_name


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LISA(active_layers=0), "active_layers is 0"),
        (lambda: LISA(active_layers=2.5), "active_layers is 2.5"),
        (lambda: LISA(active_layers=True), "active_layers is True"),
        (lambda: LISA(period=0), "period is 0"),
        (lambda: OwLore(rank=0), "rank is 0"),
        (lambda: OwLore(gap=-1), "gap is -1"),
        (lambda: GaLore(scale=0), "scale is 0"),
        (lambda: GaLore(scale=float("nan")), "scale is nan"),
        (lambda: LoRAFA(alpha="32"), "alpha is '32'"),
        (lambda: LISA(embeddings="alway"), "embeddings 'alway': did you mean 'always'"),
        (lambda: LISA(retired_state="pages"), "retired_state 'pages': did you mean 'page'"),
        (lambda: BAdam(order="randomly"), "did you mean 'random'"),
        (lambda: OWS(design="marginal"), "did you mean 'marginals'"),
        (lambda: OWS(scores="outliers"), "did you mean 'outlier'"),
        (lambda: OWS(scores=("a", "b")), "one finite number"),
        (lambda: OWS(scores=(1.0, float("inf"))), "one finite number"),
        (lambda: OWS(scores=None), "one finite number"),
        (lambda: LoRAFA(targets=()), "targets is"),
        (lambda: LoRAFA(targets=("q_proj", 3)), "targets is"),
        (lambda: LoRAFA(targets=None), "targets is"),
    ],
)
def test_settings_out_of_range_are_refused(make: Any, message: str) -> None:
    """Each names the setting, what was given and what is wanted."""
    with pytest.raises(InputError, match=message):
        make()


def test_defaults_are_the_published_ones() -> None:
    """The numbers that users see in the documentation."""
    assert LISA() == LISA(active_layers=2, period=20, embeddings="always", retired_state="drop")
    assert OwLore() == OwLore(active_layers=5, period=50, rank=128, scores="outlier", embeddings="low-rank")
    assert BAdam() == BAdam(period=50, order="random", active_layers=1, embeddings="frozen")
    assert LoRAFA() == LoRAFA(rank=16, alpha=32, targets="all-linear")
    assert GaLore().rank == 128


@pytest.mark.parametrize("name", METHODS)
def test_each_method_is_made_by_name_and_told_as_json(name: str) -> None:
    """`settings()` survives JSON and makes the same method again."""
    method = method_by_name(name.upper())
    settings = json.loads(json.dumps(method.settings()))
    assert settings.pop("method") == name
    assert method_by_name(name, **settings) == method


def test_sequences_become_tuples() -> None:
    """Scores and targets may be lists, a target a single name."""
    assert OWS(scores=[1, 2]) == OWS(scores=(1, 2))
    assert LoRAFA(targets=["q_proj"]) == LoRAFA(targets="q_proj") == LoRAFA(targets=("q_proj",))
    hash(OWS(scores=[1, 2]))


def test_names_and_settings_that_are_misspelt_are_refused() -> None:
    """The nearest method, and the settings that the method has."""
    with pytest.raises(InputError, match="unknown method 'owlor': did you mean 'owlore'"):
        method_by_name("owlor")
    with pytest.raises(InputError, match=r"'lisa' has no setting 'alpha'; it has active_layers, period"):
        method_by_name("lisa", alpha=4)
    with pytest.raises(InputError, match="no settings"):
        method_by_name("full", rank=4)
    assert method_by_name("lisa", active_layers=None, period=3) == LISA(period=3)
