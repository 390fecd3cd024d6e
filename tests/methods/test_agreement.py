"""Ranks that would not train the same model in the same way are refused before they begin, on all ranks alike."""

from __future__ import annotations

import importlib.metadata
import os
import tempfile
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed.ranks import on_ranks
from families import anatomy, llama, tokens
from torch import nn

from lisa_kernels import LISA, OWS, InputError, LoRAFA, OwLore, attach
from lisa_kernels.methods.agreement import agree

METHOD = LISA(active_layers=1, period=2)
PAGES = Path(tempfile.gettempdir()) / "pages-of-ranks"


def with_other_weight() -> Any:
    model = llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] += 1e-6
    return model


def with_frozen_norm() -> Any:
    model = llama()
    model.model.norm.weight.requires_grad_(False)
    return model


def on_meta() -> Any:
    model = llama()
    model.lm_head.to("meta")
    return model


# What each rank attaches: a model by a method with settings.
Attempt = tuple[Callable[[], Any], Any, dict[str, Any]]
USUAL: Attempt = (llama, METHOD, {})


def usual(make: Callable[[], Any] = llama, method: Any = METHOD, **settings: Any) -> Attempt:
    return make, method, settings


# What the two ranks attach, and what both say.
CASES: dict[str, tuple[Attempt, Attempt, str]] = {
    "weights": (
        USUAL,
        usual(with_other_weight),
        r"before training, 1 of 30 tensors .* first model\.layers\.1\.mlp\.up_",
    ),
    "seed": (USUAL, usual(seed=1), r"ranks differ in seed: rank 0 has 0\.0, rank 1 1\.0"),
    "rate": (USUAL, usual(lr=2e-4), r"ranks differ in lr: rank 0 has 0\.0001, rank 1 0\.0002"),
    "method": (USUAL, usual(method=LISA(active_layers=2)), "ranks differ in the method: .*'active_layers': 1"),
    "layers": (USUAL, usual(lambda: llama(layers=2)), r"ranks differ: rank 0 has model\.layers\.2\..*norm"),
    "dtype": (
        USUAL,
        usual(lambda: llama().bfloat16()),
        r"ranks differ in model\.embed.*float32 on cpu.*bfloat16 on cpu",
    ),
    "frozen": (USUAL, usual(with_frozen_norm), r"ranks differ in model\.norm\.weight: .*, frozen"),
    "wire": (USUAL, usual(wire_dtype="bf16"), "ranks differ in wire_dtype: rank 0 has None, rank 1 'bf16'"),
    "refused on rank 1": (USUAL, usual(on_meta), r"(rank 1 stopped: )?lm_head\.weight is on the meta device"),
    "refused on rank 0": (usual(method=LoRAFA(rank=500)), USUAL, "(rank 0 stopped: )?rank is 500|.*rank 500"),
    "no data on rank 0": (
        usual(method=OWS(active_layers=1)),
        usual(method=OWS(active_layers=1), calibration=[tokens()]),
        "(rank 0 stopped: )?scores of kind 'outlier' need calibration batches",
    ),
    "one folder": (
        usual(paging=f"file:{PAGES}"),
        usual(paging=f"file:{PAGES}"),
        'paging is "file:.*pages-of-ranks", one folder for several ranks, and a folder holds the pages of one',
    ),
    "no folder": (
        usual(paging=f"file:{PAGES}"),
        usual(paging="file:/dev/null/pages"),
        r"ranks differ in paging: rank 0 has 'file:.*', rank 1 'file:/dev/null/pages'",
    ),
}


def attempts(rank: int) -> dict[str, tuple[str, bool]]:
    warnings.simplefilter("ignore")
    found = {}
    for name, (*each, _) in CASES.items():
        make, method, settings = each[rank]
        model, sentence = make(), ""
        before = anatomy(model)
        try:
            attach(model, method, **settings)
        except InputError as error:
            sentence = str(error)
        found[name] = sentence, anatomy(model) == before
    return found


def draws(rank: int) -> dict[str, Any]:
    """Attach with calibration batches, scores and rates that make no difference, or one that does not matter."""
    found = {}
    for name, settings in {
        "own batches": {"calibration": [tokens(rows=1 + rank, seed=rank)]},
        "rank 0's scores": {"scores": [1.0, 2.0, 3.0] if rank == 0 else [3.0, 2.0, 1.0]},
    }.items():
        optimizer = attach(llama(), OWS(active_layers=1, period=1), **settings)
        assert optimizer.sampler is not None
        found[name] = optimizer.sampler.state_dict()
    own = attach(with_other_weight() if rank else llama(), METHOD, ranks=None)
    found["own gradients"] = own.active_layers
    return found


def versions(rank: int) -> dict[str, str]:
    """Return what is said where rank 1 has another version of a package."""
    found = {}
    for name, owner, attribute, other in (
        ("lisa_kernels", importlib.metadata, "version", lambda package: "0.0.1"),
        ("torch", torch, "__version__", "1.0"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            if rank:
                patch.setattr(owner, attribute, other)
            with pytest.raises(InputError) as caught:
                attach(llama(), METHOD)
        found[name] = str(caught.value)
    return found


def own_folders(rank: int, folder: str) -> int:
    """Return how many layers train where pages have a folder on a disk of each rank."""
    os.chdir(Path(folder) / str(rank))
    return len(attach(llama(), METHOD, paging="file:pages").active_layers)


def both(rank: int) -> tuple[dict[str, tuple[str, bool]], dict[str, Any]]:
    return attempts(rank), draws(rank)


@pytest.fixture(scope="module")
def found() -> list[Any]:
    return on_ranks(both)


@pytest.mark.parametrize("case", CASES)
def test_what_differs_is_named_on_all_ranks(case: str, found: list[Any]) -> None:
    """One sentence with the first difference; the models are as they were, and the ranks go on together."""
    for sentence, untouched in (each[0][case] for each in found):
        assert untouched
        assert "\n" not in sentence
        with pytest.raises(InputError, match=f"^({CASES[case][2]})"):
            raise InputError(sentence)


def test_other_versions_are_named() -> None:
    """On both ranks, before anything is compared that they may have otherwise."""
    for each in on_ranks(versions):
        assert each["lisa_kernels"].startswith("ranks differ in the version of lisa_kernels: rank 0 has ")
        assert each["torch"].startswith("ranks differ in the version of torch: rank 0 has ")
        assert each["torch"].endswith(", rank 1 '1.0'.")


def test_pages_may_have_a_folder_on_each_machine(tmp_path: Path) -> None:
    """Of one name, on disks that are not shared; no mark is left there."""
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    assert on_ranks(own_folders, str(tmp_path)) == [1, 1]
    assert not list(tmp_path.rglob(".rank-*"))


def test_the_scores_are_those_of_rank_0(found: list[Any]) -> None:
    """Whatever batches, or numbers, the others have: all ranks draw the same layers."""
    first, second = (each[1] for each in found)
    assert first == second


def alone(rank: int) -> bool:
    """Return whether training in a group of one process gives the weights of training without."""
    runs = []
    for ranks in ("auto", None):
        model = llama()
        optimizer = attach(model, OwLore(active_layers=1, period=2, rank=4, scores="uniform"), ranks=ranks)
        assert optimizer._reduction is None
        assert not any(param._post_accumulate_grad_hooks for param in model.parameters())
        for seed in range(4):
            with optimizer.no_sync():
                model(**tokens(seed=seed)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append([param.detach().clone() for param in model.parameters()])
    return all(map(torch.equal, *runs))


def test_one_process_is_no_rank() -> None:
    """A group of one changes nothing: no hook on a gradient, no sum, and no_sync() does nothing."""
    assert on_ranks(alone, count=1) == [True]


def test_a_tensor_as_a_rate_is_compared_by_its_value() -> None:
    """As a plain number travels: what is told is what the others are told."""

    class ToldError(Exception):
        pass

    class One:
        def together(self) -> Any:
            return nullcontext()

        def check_carries(self, device: torch.device) -> None:
            pass

        def check_alike(self, facts: dict[str, Any]) -> None:
            raise ToldError(facts["lr"], facts["betas"])

    with pytest.raises(ToldError, match=r"\(0\.5, \[0\.25, 0\.5\]\)"):
        agree(One(), nn.Linear(2, 2), METHOD, {"lr": torch.tensor(0.5), "betas": (0.25, 0.5)})  # type: ignore[arg-type]
