"""A run's options as a workload, and a workload as a command line that leads back to it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from lisa_kernels.cli import main
from lisa_kernels.methods import LISA, OWS, BAdam, FullFineTune, GaLore, LoRA, LoRAFA, Method, OwLore
from lisa_kernels.plan.options import finetune_command, workload_of
from lisa_kernels.plan.rehearsal import Workload
from lisa_kernels.plan.result import Plan
from lisa_kernels.plan.trace import Trace
from lisa_kernels.train.options import FineTuneOptions

from .small_config import write_config


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_config(tmp_path_factory.mktemp("model")))


def options(config: str, **settings: Any) -> FineTuneOptions:
    return FineTuneOptions(model=config, data="", output=Path(), **{"dtype": "bf16", **settings})


def test_what_decides_memory_is_taken_over(config: str) -> None:
    given = options(
        config, method="lisa", batch_size=3, seq_len=20, accumulate=2, max_grad_norm=0.0, keep_logits=True, seed=5,
        period=9,
    )  # fmt: skip
    assert workload_of(given) == Workload(
        config, LISA(rank=16, period=9), batch_size=3, seq_len=20, accumulate=2, dtype="bf16",
        gradient_checkpointing=False, max_grad_norm=None, keep_logits=True, seed=5,
    )  # fmt: skip


def test_defaults_that_depend_on_the_model_are_settled_on_it(config: str) -> None:
    """Three layers whose smallest side is 64 hold 3 active ones and rank 16; small models keep their activations."""
    workload = workload_of(options(config))
    assert workload.method == LoRA(embeddings="low-rank")
    assert workload_of(options(config, method="owlore")).method == OwLore(active_layers=3, rank=16)
    assert not workload.gradient_checkpointing
    assert workload_of(options(config, gradient_checkpointing=True)).gradient_checkpointing


def test_large_models_recompute_activations() -> None:
    assert workload_of(options("preset:tinyllama-1.1b", method="lisa")).gradient_checkpointing


METHODS: list[Method] = [
    LISA(period=7), OWS(scores="uniform", design="shallow"),
    OwLore(active_layers=2, rank=8, master="remainder", embeddings="low-rank"),
    BAdam(), GaLore(rank=8), LoRAFA(rank=4, alpha=8.0, targets=("q_proj", "v_proj")), FullFineTune(),
]  # fmt: skip

CHANGES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "offloaded": {"offload_activations": True},
    "everything else": {
        "accumulate": 3, "dtype": "fp32", "gradient_checkpointing": False, "max_grad_norm": None, "keep_logits": True,
        "seed": 4, "paging": "file:/some where/pages",
    },
}  # fmt: skip


def led_back(workload: Workload, monkeypatch: pytest.MonkeyPatch) -> FineTuneOptions:
    """Return the options that the command line of a workload becomes."""
    seen: list[FineTuneOptions] = []
    monkeypatch.setattr("lisa_kernels.train.finetune.finetune", lambda given, *_, **__: (seen.append(given) or 0, {}))
    words = shlex.split(finetune_command(workload))
    assert words[:2] == ["lisa-kernels", "finetune"]
    assert main(words[1:]) == 0
    return seen[0]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("changes", CHANGES)
def test_the_command_line_is_the_workload(
    method: Method, changes: str, config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given to the command line, it makes a run whose workload is the one that it was written for."""
    workload = Workload(config, method, **{"batch_size": 2, "seq_len": 16, **CHANGES[changes]})
    given = led_back(workload, monkeypatch)
    assert (given.data, str(given.output)) == ("DATA", "OUTPUT")
    assert workload_of(given) == workload


@pytest.mark.parametrize(("steps", "period"), [(None, 20), (12, 4)])
def test_a_period_that_is_not_given_follows_from_the_length(
    steps: int | None, period: int, config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan tells the one that the run takes, and leaves it to the run in the command line."""
    workload = workload_of(options(config, method="lisa", steps=steps))
    assert Plan(workload, Trace([])).as_dict()["method"]["period"] == period
    given = led_back(workload, monkeypatch)
    assert given.period is None
    assert workload_of(given) == workload


@pytest.mark.parametrize("method", ["lora", "lisa"])
@pytest.mark.parametrize("length", [{"steps": 700}, {"epochs": 2.5}], ids=str)
def test_the_command_line_is_as_long_a_run(
    method: str, length: dict[str, Any], config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether or not something follows from its length, and where a period is given too."""
    for more in ({}, {"period": 9} if method == "lisa" else {}):
        given = led_back(workload_of(options(config, method=method, **length, **more)), monkeypatch)
        assert {"steps": given.steps, "epochs": given.epochs} == {"steps": None, "epochs": None, **length}


def test_of_passes_the_length_is_not_known_before_the_data() -> None:
    """Unless they are those of a run whose record is planned."""
    workload = workload_of(options("preset:tiny", method="badam", epochs=2.0))
    assert Plan(workload, Trace([])).as_dict()["method"]["period"] == "auto"
    recorded = workload_of(options("preset:tiny", method="badam", epochs=2.0, taken={"period": 7}))
    assert (recorded.method, recorded.length) == (BAdam(period=7, rank=32), None)


def test_expandable_segments_are_set_for_that_command_alone(config: str) -> None:
    command = finetune_command(Workload(config, LISA()), expandable=True)
    assert command.startswith("PYTORCH_ALLOC_CONF=expandable_segments:True lisa-kernels finetune --model ")
