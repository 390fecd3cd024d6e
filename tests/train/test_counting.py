"""Passes over the rows: every row is handed out as often as was asked, whatever batches and accumulation leave over."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from families import llama
from transformers import TrainerCallback

from lisa_kernels import LISA, attach
from lisa_kernels.train.counting import steps_of_passes
from lisa_kernels.train.finetune import _training_arguments
from lisa_kernels.train.options import FineTuneOptions
from lisa_kernels.train.taken import Taken, run_steps
from lisa_kernels.train.trainer import FineTuneTrainer


class StopAt(TrainerCallback):
    """Saves and stops at a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def handed_out(options: FineTuneOptions, rows: int, stop_at: int | None = None) -> list[int]:
    """Return the rows that steps were taken on, in their order; with stop_at in two runs, the second resumed there."""
    taken, steps = Taken(1e-4, 20, 0), run_steps(options, rows)
    data = [{"input_ids": torch.tensor([row, row]), "labels": torch.tensor([row, row])} for row in range(rows)]

    def one(callbacks: list[Any], checkpoint: Path | None) -> list[int]:
        seen: list[int] = []
        model = llama(layers=1)

        optimizer = attach(model, LISA(active_layers=1), lr=1e-4)
        model.register_forward_pre_hook(
            lambda module, args, inputs: seen.extend(inputs["input_ids"][:, 0].tolist()), with_kwargs=True
        )
        trainer = FineTuneTrainer(
            model=model, args=_training_arguments(options, taken, steps, False, torch.device("cpu")),
            train_dataset=data, optimizers=(optimizer, None), callbacks=callbacks,
        )  # fmt: skip
        trainer.train_on(checkpoint)
        return seen

    if stop_at is None:
        return one([], None)
    return one([StopAt(stop_at)], None) + one([], options.output / f"checkpoint-{stop_at}")


@pytest.mark.parametrize(
    ("rows", "batch", "accumulate", "passes"),
    [(9, 2, 4, 3), (9, 4, 2, 3), (5, 8, 1, 2), (4, 1, 2, 2)],
)
def test_every_row_is_seen_in_every_pass(rows: int, batch: int, accumulate: int, passes: int, tmp_path: Path) -> None:
    options = FineTuneOptions(
        model="", data="", output=tmp_path, batch_size=batch, accumulate=accumulate, epochs=float(passes)
    )
    seen = handed_out(options, rows)
    assert Counter(seen) == dict.fromkeys(range(rows), passes)
    assert all(sorted(seen[start : start + rows]) == list(range(rows)) for start in range(0, len(seen), rows))


@pytest.mark.parametrize("stop_at", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_a_run_that_goes_on_counts_as_one_run(stop_at: int, tmp_path: Path) -> None:
    """Stopped at the end of a pass and within one: the same rows in the same order."""
    options = FineTuneOptions(model="", data="", output=tmp_path, batch_size=2, accumulate=3, epochs=2.0)
    whole = handed_out(options, 9)
    assert handed_out(options, 9, stop_at) == whole
    assert Counter(whole) == dict.fromkeys(range(9), 2)


def test_the_share_of_a_pass_is_rounded_up() -> None:
    """To whole rows, batches and steps, and not one more where the share is whole."""
    assert steps_of_passes(0.1, rows=30, batch_size=1, accumulate=1) == 3
    assert steps_of_passes(0.1, rows=31, batch_size=1, accumulate=1) == 4
    assert steps_of_passes(1.5, rows=9, batch_size=2, accumulate=2) == 3 + 2
    assert steps_of_passes(0.001, rows=9, batch_size=2, accumulate=2) == 1
    assert steps_of_passes(3.0, rows=10**9, batch_size=1, accumulate=1) == 3 * 10**9
