"""Plans of packed rows: bytes and work as the run's, with segments and under a mask, and what is told of rows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lisa_kernels import LISA
from lisa_kernels.cli import main
from lisa_kernels.layers import attend_by_segments, borders_mask
from lisa_kernels.plan.data_rows import DataRows, packed_batch
from lisa_kernels.plan.rehearsal import Workload, prepare, rehearse, take_steps
from lisa_kernels.plan.tracker import StorageTracker
from lisa_kernels.plan.work import SEGMENTS, SEGMENTS_BACKWARD, WorkLog
from lisa_kernels.train.chat import Example
from lisa_kernels.train.packing import row_of

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
