"""The Trainer of a run asks the device nothing between two logs, and scales the loss of float16 weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_run import arguments, summary, write_text
from transformers import Trainer

from lisa_kernels.cli import main
from lisa_kernels.errors import InputError
from lisa_kernels.optim import AdamW8bit
from lisa_kernels.train.checkpoint import find_checkpoints, load_tree
from lisa_kernels.train.finetune import _check_within_float16, _training_arguments
from lisa_kernels.train.options import FineTuneOptions
from lisa_kernels.train.taken import Taken
from lisa_kernels.train.trainer import TRAINING_STATE, FineTuneTrainer


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
    taken = Taken(1e-3, None, 0)
    arguments = _training_arguments(options, taken, 8, False, torch.device("cpu"))
    assert not arguments.logging_nan_inf_filter
    assert not arguments.accelerator_config.non_blocking
    given: dict[str, object] = {}
    monkeypatch.setattr("lisa_kernels.train.trainer.OneDevice", lambda **kwargs: given.update(kwargs))
    _training_arguments(options, taken, 8, False, torch.device("cuda", 1))
    assert given["dataloader_pin_memory"] is True
    assert given["accelerator_config"] == {"non_blocking": True}


def test_float16_weights_train_with_a_scaled_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step sees gradients times the scale: without one, those of a confident model are zeros in float16."""
    scales: list[float] = []
    measure = AdamW8bit._unscaling

    def noted(self: AdamW8bit, device: torch.device) -> torch.Tensor:
        if device.type == "cpu":  # and not of the plan's rehearsal
            scales.append(1 / float(measure(self, device)))
        return measure(self, device)

    monkeypatch.setattr(AdamW8bit, "_unscaling", noted)
    data, run = write_text(tmp_path), tmp_path / "run"
    flags = ["--dtype", "fp16", "--steps", "4", "--save-every", "2", "--lr", "1e-2"]
    assert main(arguments(data, run, *flags)) == 0
    assert min(scales) > 1
    assert load_tree(find_checkpoints(run)[-1], TRAINING_STATE)["scaler"]["scale"] == scales[-1]
    done = summary(run)
    assert done["eval_loss_after"] < done["eval_loss_before"]
    assert done["skipped_steps"] < 4


def test_a_model_beyond_float16_is_refused_before_it_trains() -> None:
    """With held-out rows only: without any there is no loss, and with float32 the loss is the model's own."""
    with pytest.raises(InputError, match=r"not finite in fp16.*--dtype fp32"):
        _check_within_float16("fp16", None, 1)
    _check_within_float16("fp16", 7.0, 1)
    _check_within_float16("fp16", None, 0)
    _check_within_float16("fp32", None, 1)
