"""Where the figures of a run go while it runs."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from small_run import arguments, write_text

from lisa_kernels.cli import main
from lisa_kernels.errors import InputError
from lisa_kernels.train.options import FineTuneOptions
from lisa_kernels.train.reporters import check_reporters, reporters


def options(report_to: str) -> FineTuneOptions:
    return FineTuneOptions("preset:tiny", "stdlib", Path(), report_to=report_to)


def test_reporters_are_a_list_with_commas() -> None:
    assert options("none").reporters == []
    assert options("wandb,tensorboard,wandb").reporters == ["wandb", "tensorboard"]
    with pytest.raises(InputError, match=r"did you mean 'wandb'"):
        options("tensorboard,wandbb")


def test_a_missing_package_is_told_before_anything_is_made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else real(name, *rest))
    text = write_text(tmp_path)
    assert main(arguments(text, tmp_path / "run", "--report-to", "tensorboard,wandb")) == 2
    assert "pip install wandb" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    monkeypatch.setitem(sys.modules, "wandb", None)
    check_reporters(options("none"))


def test_transformers_own_integrations_see_the_gradient_norm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both at once; wandb's logs are those that its integration is handed."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from transformers import TrainerCallback, integrations

    seen: list[dict[str, Any]] = []

    class Wandb(TrainerCallback):  # type: ignore[misc]
        def setup(self, args: Any, state: Any, model: Any) -> None:
            assert args.output_dir == str(output)

        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(dict(kwargs["logs"]))

    output = tmp_path / "run"
    monkeypatch.setattr(integrations, "WandbCallback", Wandb)
    monkeypatch.setattr("lisa_kernels.train.reporters.check_reporters", lambda options: None)
    monkeypatch.setattr("lisa_kernels.train.preparation.check_reporters", lambda options: None)
    assert main(arguments(write_text(tmp_path), output, "--report-to", "tensorboard,wandb", "--steps", "2")) == 0
    assert all({"loss", "grad_norm", "learning_rate"} <= logs.keys() for logs in seen[:2])
    events = EventAccumulator(str(output / "tensorboard")).Reload()
    assert {"train/loss", "train/grad_norm", "train/learning_rate"} <= set(events.Tags()["scalars"])


def test_a_wandb_that_does_not_begin_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where nobody is logged in, before the run has a folder."""
    from transformers import integrations

    class Wandb:
        def setup(self, args: Any, state: Any, model: Any) -> None:
            raise RuntimeError("api_key not configured (no-tty).\nmore")

    monkeypatch.setattr(integrations, "WandbCallback", Wandb)
    trainer = SimpleNamespace(args=None, state=None, model=None)
    with pytest.raises(
        InputError, match=r"does not begin \(api_key not configured \(no-tty\)\); run wandb login"
    ) as told:
        reporters(options("wandb"), trainer)
    assert "\n" not in str(told.value)
