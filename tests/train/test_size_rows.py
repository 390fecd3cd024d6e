"""A run whose weights rest by size gives its first rows for that, and says what was found."""

from __future__ import annotations

import importlib
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from families import llama
from rich.console import Console
from small_run import arguments, summary, write_text

from lisa_kernels import LoRA, attach
from lisa_kernels.cli import main
from lisa_kernels.layers import RestingLinear
from lisa_kernels.methods.code_losses import BATCHES
from lisa_kernels.train.options import FineTuneOptions
from lisa_kernels.train.size_rows import ROW_TOKENS, rows_for_size, tell_picks
from lisa_kernels.train.tokenize import TokenizedData


def options(resting: str | None) -> FineTuneOptions:
    return FineTuneOptions(model="preset:tiny", data="text.txt", output=Path("run"), method="lora", resting=resting)


def quiet_console() -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, width=200), text


def test_the_first_rows_are_given_where_a_size_is_filled_by_them() -> None:
    ids = [torch.tensor([number, 7, 8]) for number in range(10, 20)]
    ids[1] = torch.arange(ROW_TOKENS + 5)
    data = TokenizedData([{"input_ids": row, "labels": row} for row in ids])
    console, text = quiet_console()
    for resting in (None, "nf4", "16-bit"):
        assert rows_for_size(options(resting), data, 0, console) is None
    assert text.getvalue() == ""
    for resting in ("2MB", "mixed"):
        batches = rows_for_size(options(resting), data, 0, console)
        assert batches is not None
        assert [batch["input_ids"].tolist() for batch in batches] == [
            [row[:ROW_TOKENS].tolist()] for row in ids[:BATCHES]
        ]
        assert all(batch["labels"].shape == batch["input_ids"].shape for batch in batches)
        assert f"a backward of {BATCHES} training rows" in text.getvalue()


def test_what_was_found_is_said() -> None:
    model = llama(layers=2, hidden_size=64, intermediate_size=96)
    attach(model, LoRA(rank=4), resting="60kB")
    console, text = quiet_console()
    tell_picks(options("60kB"), model, console)
    layers = [module for module in model.modules() if isinstance(module, RestingLinear)]
    codes = sum(layer.codes.nbytes + layer.scales.nbytes for layer in layers)
    in_8_bits = sum(layer.kind == "int8" for layer in layers)
    assert 1 < in_8_bits < 15
    said = f"note: {in_8_bits} of 15 matrices rest in 8 bits, the others in 4: {codes / 1e3:.1f} kB of 60kB\n"
    assert text.getvalue() == said


@pytest.mark.usefixtures("plans_once")
@pytest.mark.parametrize("resting", ["3MB", pytest.param("mixed", marks=pytest.mark.slow)])
def test_a_run_fills_a_size_by_its_rows(resting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[Any] = []
    module = importlib.import_module("lisa_kernels.methods.attach")
    real = module.measure_code_losses

    def measure(model: Any, layers: Any, batches: Any, blocks: Any, device: Any) -> Any:
        measured.append(batches)
        assert len(blocks) == len(model.model.layers)
        return real(model, layers, batches, blocks, device)

    monkeypatch.setattr(module, "measure_code_losses", measure)
    assert main(arguments(write_text(tmp_path), tmp_path / "run", "--resting", resting, method="lora")) == 0
    [batches] = measured
    assert len(batches) == BATCHES
    assert all(isinstance(batch["input_ids"], torch.Tensor) for batch in batches)
    values = summary(tmp_path / "run")
    assert values["eval_loss_after"] < values["eval_loss_before"]
