"""Tables of bench/README.md come from recorded rows, the newest of each kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.readme import (
    README,
    ROWS,
    TABLES,
    lowrank_table,
    markdown,
    memory_table,
    optimizer_table,
    put,
    step_table,
    update_table,
)
from bench.rows import read_rows


def row(**changed: Any) -> dict[str, Any]:
    return {
        "ran_on": "cpu", "elements": 1 << 24, "tensors": 1, "dtype": "fp32", "optimizer": "ours", "p50_ms": 10.0,
        "ns_per_element": 0.6, "ratio_to_torch_fused_fp32": 0.9, "state_bytes_per_element": 2.03, "reason": None,
        **changed,
    }  # fmt: skip


def test_the_newest_row_of_each_optimizer_counts() -> None:
    rows = [row(ns_per_element=9.0), row(), row(optimizer="theirs", p50_ms=None, reason="needs CUDA")]
    lines = optimizer_table(rows).splitlines()
    assert lines[2] == "| ours | fp32 | - | 0.6 (0.90×) | - | - | 2.03 |"
    assert lines[3].startswith("| theirs | fp32 | - | needs CUDA |")


def test_rows_of_gpus_stay_out_of_the_table_of_cpus() -> None:
    assert len(optimizer_table([row(ran_on="cuda")]).splitlines()) == 2


def test_a_table_goes_between_its_markers_and_nowhere_else(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    page = "a\n<!-- x table: written by bench -->\nold\n<!-- end of x table -->\nb\n"
    readme.write_text(page)
    assert put("x", markdown(["h"], [["1"]]), readme)
    assert readme.read_text() == page.replace("old", "| h |\n| --- |\n| 1 |")
    assert not put("y", "text", readme)


@pytest.mark.parametrize("name", TABLES)
def test_the_page_shows_the_recorded_rows(name: str, tmp_path: Path) -> None:
    """Writing a table anew changes nothing: no figure was typed, and none is older than its row."""
    page = tmp_path / "README.md"
    page.write_text(README.read_text())
    assert put(name, TABLES[name](read_rows(ROWS.get(name, name))), page)
    assert page.read_text() == README.read_text()


def step_row(**changed: Any) -> dict[str, Any]:
    return {
        "ran_on": "cpu", "geometry": "12 layers", "batch": 4, "seq_len": 256, "dtype": "fp32", "settings": "rank 64",
        "name": "lisa", "method": "LISA", "reason": None, "step_ms": 2500.0, "forward_ms": 900.0, "backward_ms": 1200.0,
        "optimizer_ms": 380.0, "refresh_ms": 20.0, "ratio_to_peft_lora": 0.7, "ratio_to_full": None,
        "saved_bytes": 3 << 20, "state_bytes": 2 << 20, "peak_bytes": 1 << 30, **changed,
    }  # fmt: skip


def test_steps_of_another_case_stay_out_of_the_table() -> None:
    """Only what was measured last is comparable; a reason takes the place of numbers."""
    other = step_row(geometry="4 layers", name="full", method="full")
    missing = step_row(name="badam", method="badam", step_ms=None, reason="not installed")
    lines = step_table([other, step_row(step_ms=1.0), missing, step_row(ran_on="cuda"), step_row()]).splitlines()
    assert lines[2:] == [
        "| LISA | 2.50 | 0.90 | 1.20 | 0.38 | 0.020 | 0.70× | - | 3 | 2 | 1,024 | wall |",
        "| badam | not installed |" + " - |" * 10,
    ]
    assert {line.count("|") for line in lines} == {13}
    told = step_table([step_row(clock="process", wall_ratio_to_peft_lora=0.714)])
    assert told.endswith("| process (wall: 0.71×) |")


def layer_row(**changed: Any) -> dict[str, Any]:
    return {
        "ran_on": "cpu", "part": "layer", "dtype": "fp32", "inputs": 8, "outputs": 16, "name": "low-rank",
        "layer": "ours", "update": "ours", "reason": None, "tokens": 1000, "backward_ms": 5.0, "saved_bytes": 4000,
        "backward_ratio_to_frozen": 1.1, "update_ms": 2.0, "ratio_to_galore_torch": 0.02, **changed,
    }  # fmt: skip


def test_layers_have_a_column_for_each_shape_and_updates_a_table_of_their_own() -> None:
    rows = [
        layer_row(backward_ms=9.0), layer_row(), layer_row(inputs=32, dtype="bf16"), layer_row(part="update"),
        layer_row(part="update", inputs=32, reason="slow", update_ms=None),
    ]  # fmt: skip
    assert lowrank_table(rows).splitlines()[2:] == [
        "| ours | fp32 | 5 µs (1.1×), 4 B | - |",
        "| ours | bf16 | - | 5 µs (1.1×), 4 B |",
    ]
    assert update_table(rows).splitlines()[2:] == ["| ours | fp32 | 2 ms (0.02×) | slow |"]


def memory_row(**changed: Any) -> dict[str, Any]:
    return {
        "name": "lisa", "method": "LISA", "model": "large", "batch": 1, "seq_len": 1024,
        "gradient_checkpointing": True, "planned_bytes": 16_370_000_000, "measured_bytes": None, "reason": None,
        **changed,
    }  # fmt: skip


def test_peaks_have_a_column_for_each_model_those_measured_last() -> None:
    """The newest row counts; another batch stays out; a reason takes the place of numbers."""
    rows = [
        memory_row(model="small", planned_bytes=1_234_567, measured_bytes=1_234_568), memory_row(planned_bytes=1),
        memory_row(batch=16), memory_row(name="badam", method="badam", planned_bytes=None, reason="not installed"),
        memory_row(),
    ]  # fmt: skip
    assert memory_table(rows).splitlines() == [
        "| method | large | small |",
        "| --- | --- | --- |",
        "| LISA | 16.37 GB | 1.235 MB planned, 1.235 measured |",
        "| badam | not installed | - |",
    ]
