"""Plans of packed rows: bytes and work as the run's, with segments and under a mask, and what is told of rows."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from families import llama
from rich.console import Console
from torch import Tensor

from lisa_kernels import LISA
from lisa_kernels.cli import main
from lisa_kernels.layers import attend_by_segments, borders_mask
from lisa_kernels.plan.command import plan_run
from lisa_kernels.plan.data_rows import DataRows, packed_batch
from lisa_kernels.plan.rehearsal import Workload, prepare, rehearse, take_steps
from lisa_kernels.plan.tracker import StorageTracker
from lisa_kernels.plan.work import SEGMENTS, SEGMENTS_BACKWARD, WorkLog
from lisa_kernels.train.chat import Example
from lisa_kernels.train.finetune import finetune
from lisa_kernels.train.models import train_tokenizer
from lisa_kernels.train.options import FineTuneOptions
from lisa_kernels.train.packing import row_of
from lisa_kernels.train.preparation import prepare_run
from lisa_kernels.train.prepare import RunData, read_data

from .small_runs import VOCABULARY, config, real_model, workload

ROWS = ((64,), (20, 30), (16, 16, 16), (40,))


def packed(family: str = "llama", **changes: object) -> Workload:
    return replace(workload(family, LISA(embeddings="frozen"), seq_len=64), data=DataRows(ROWS), **changes)


def real_peak(given: Workload, by_segments: bool) -> int:
    """Return the peak of the same steps on the CPU, with weights and numbers."""
    model, tracker = real_model(given), StorageTracker("cpu")
    assert attend_by_segments(model, 64) == by_segments

    def batch() -> dict[str, Tensor]:
        made = packed_batch(given.rows(), by_segments, torch.device("cpu"))
        lengths = torch.tensor([length for row in given.rows() for length in row])
        if not by_segments:
            made["position_ids"] = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in ((64,), (20, 44))])
            return made | {"labels": made["position_ids"].clamp(max=VOCABULARY - 1)}
        made["position_ids"] = torch.cat([torch.arange(int(n)) for n in lengths])[None]
        return made | {"labels": torch.where(made["position_ids"] == 0, -100, 1)}

    with tracker:
        take_steps(model, prepare(model, given), given, tracker, batch)
    return tracker.trace().peak_bytes


def test_segments_are_planned_to_the_byte() -> None:
    """But for the borders themselves, which a plan has on another device."""
    given = packed()
    borders = borders_mask(torch.zeros(4)).nbytes
    assert 0 <= real_peak(given, by_segments=True) - rehearse(given).peak_bytes <= 3 * borders


def test_a_model_that_needs_a_mask_is_planned_with_one() -> None:
    """Windows of 8 tokens are shorter than the examples: masks of all pairs, and more than without packing."""
    given = replace(packed(), model=config("mistral", sliding_window=8))
    planned = rehearse(given).peak_bytes
    assert planned > rehearse(replace(given, model=config("mistral", sliding_window=64))).peak_bytes
    assert abs(real_peak(given, by_segments=False) - planned) <= 0.02 * planned


def test_work_is_that_of_pairs_within_segments() -> None:
    """2 products of 2 operations over half of each segment's square, and 2.5 times as much in a backward."""
    given, work = packed(batch_size=1), WorkLog()
    given = replace(given, data=DataRows(((10, 30),)))
    rehearse(given, work=work)
    found = {key[0]: operation.products for key, operation in work.operations.items() if operation is not None}
    assert found[SEGMENTS] == 2 * given.model.hidden_size * (10**2 + 30**2)
    assert found[SEGMENTS_BACKWARD] == 2.5 * found[SEGMENTS]


def test_the_largest_and_a_typical_batch_are_of_the_rows() -> None:
    examples = [Example([0] * n, [0] * n) for n in (5, 3, 9, 2)]
    rows = [row_of(examples[:2], True), row_of(examples[2:3], True), row_of(examples[3:], False)]
    data = DataRows.of(rows)
    assert data.rows == ((9,), (5, 3), (2,))
    assert (data.longest, data.fullest(2), data.typical(1)) == (9, ((9,), (5, 3)), ((5, 3),))
    assert data.typical(7) == data.rows
    assert data.as_dict(10) == {"rows": 3, "examples": 4, "tokens": 19, "empty_share": 1 - 19 / 30, "longest_row": 9}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with a tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = train_tokenizer(["a question and its answer"], 280)
    llama(layers=2, vocab_size=len(tokenizer), max_position_embeddings=128).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run_of(base: Path, folder: Path, **more: Any) -> FineTuneOptions:
    """Return a run on 24 examples of 32 tokens, all of them labels, four to a row."""
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": "", "completion": "x" * 31}) + "\n" for _ in range(24)))
    given: dict[str, Any] = {
        "method": "owlore", "active_layers": 2, "rank": 4, "embeddings": "frozen", "scores": "uniform", "steps": 3,
        "seq_len": 128, "batch_size": 2, "dtype": "fp32", "eval_fraction": 0.0, "samples": 0, "device": "cpu",
    }  # fmt: skip
    return FineTuneOptions(str(base), str(data), folder / "run", **{**given, **more})


def no_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have no attention take the borders of examples, as none of float32 does on a GPU."""
    for module in ("train.prepare", "plan.rehearsal"):
        # The package's function of the same name hides one of them.
        monkeypatch.setattr(import_module(f"lisa_kernels.{module}"), "attend_by_segments", lambda *given, **how: False)


def bytes_of(data: RunData) -> int:
    rows = [*data.train.rows, *data.shared[0].rows]
    return sum(tensor.nbytes for row in rows for tensor in row.values())


@pytest.mark.parametrize(
    "by_segments", [pytest.param(True, marks=pytest.mark.slow), False], ids=["segments", "mask"]
)  # fmt: skip
def test_a_run_prints_the_plan_of_the_rows_that_it_makes(
    by_segments: bool, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tensors take that, and those that hold its data; without the data the plan knows of no mask."""
    if not by_segments:
        no_segments(monkeypatch)
    options, tracker = run_of(base, tmp_path), StorageTracker("cpu")
    with tracker:
        tracker.recording = True
        _, summary = finetune(options, Console(file=io.StringIO()), plan_run)
    data = read_data(options, Console(file=io.StringIO()))
    planned, whole = summary["peak_bytes_planned"], plan_run(options).peak_bytes
    assert planned == plan_run(options, data=data).peak_bytes
    assert 0 <= tracker.trace().peak_bytes - planned <= bytes_of(data) + 1000
    # A byte for each pair of tokens of both rows, at the least.
    assert by_segments or planned - whole >= 2 * 128 * 128


def test_a_model_that_packing_confuses_is_planned_again_for_rows_of_one_example(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes positions, and only its weights tell that it makes nothing of them."""
    no_segments(monkeypatch)
    monkeypatch.setattr("lisa_kernels.train.prepare.isolates_packed_examples", lambda model: False)
    options, out = run_of(base, tmp_path), io.StringIO()
    run = prepare_run(options, torch.device("cpu"), Console(file=out), plan_run, None)
    assert out.getvalue().count("planned peak memory") == 2
    alone = read_data(replace(options, packing=False), Console(file=io.StringIO()))
    assert run.planned_bytes == plan_run(options, data=alone).peak_bytes


def test_the_plan_of_a_run_and_that_of_its_data_are_one(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the command `plan --data`, in the blocks of a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    options = run_of(base, tmp_path, device="auto", dtype="bf16")
    flags = (
        "--method owlore --active-layers 2 --rank 4 --embeddings frozen --scores uniform --seq-len 128 --batch-size 2"
    )
    given = ["--model", str(base), "--data", options.data, *flags.split(), "--dtype", "bf16", "--eval-fraction", "0"]
    assert main(["plan", *given, "--card", "l4", "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    data = read_data(options, Console(file=io.StringIO()))
    assert plan_run(options, data=data).peak_bytes == told["allocated_bytes"]


@pytest.mark.parametrize("packing", [True, False])
def test_the_command_tells_of_rows_and_plans_for_them(
    packing: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{n} + 1 =", "completion": f" {n + 1}"}) + "\n" for n in range(40)))
    flags = ["--data", str(data), "--seq-len", "64", "--eval-fraction", "0", *([] if packing else ["--no-packing"])]
    given = ["plan", "--model", "preset:tiny", "--method", "lisa", "--dtype", "fp32", "--card", "l4"]
    assert main([*given, *flags, "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["data_rows"]["examples"] == 40
    assert (told["data_rows"]["rows"] == 40) != packing
    assert main([*given, "--seq-len", "64", "--json"]) == 0
    whole = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "data_rows" not in whole
    assert told["peak_bytes"] <= whole["peak_bytes"]
    assert main([*given, *flags]) == 0
    assert "40 examples in" in capsys.readouterr().out.replace("\n", " ")
