"""The Trainer of a run asks the device nothing between two logs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Trainer

from lisa_kernels.train.finetune import _training_arguments
from lisa_kernels.train.options import FineTuneOptions
from lisa_kernels.train.trainer import FineTuneTrainer


def test_a_loss_that_is_no_number_is_logged_as_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers' own filter would have it, which asks for every loss and is off for that."""
    losses = [torch.tensor(value) for value in (torch.nan, 2.0, torch.inf, torch.nan, 3.0)]
    monkeypatch.setattr(Trainer, "training_step", lambda *_: losses.pop(0))
    trainer = object.__new__(FineTuneTrainer)
    found = [float(trainer.training_step(None, {})) for _ in range(5)]
    assert found == [0.0, 2.0, 2.0, 2.0, 3.0]


def test_transformers_neither_looks_at_losses_nor_waits_for_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    options = FineTuneOptions("preset:tiny", "stdlib", tmp_path)
    arguments = _training_arguments(options, 8, False, torch.device("cpu"))
    assert not arguments.logging_nan_inf_filter
    assert not arguments.accelerator_config.non_blocking
    given: dict[str, object] = {}
    monkeypatch.setattr("lisa_kernels.train.trainer.OneDevice", lambda **kwargs: given.update(kwargs))
    _training_arguments(options, 8, False, torch.device("cuda", 1))
    assert given["dataloader_pin_memory"] is True
    assert given["accelerator_config"] == {"non_blocking": True}
