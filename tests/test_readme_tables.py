"""Tables of the README come from recorded rows, the newest of each kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.readme import markdown, optimizer_table, put


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
