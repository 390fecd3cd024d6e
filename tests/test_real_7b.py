"""The run of a real 7B step, on a small geometry: what is built, the rows, and the errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import real_7b
from bench import rows as result_rows
from bench.held_bytes import STATUS
from bench.real_7b import build_model, main

TINY = ["--layers=3", "--active-layers=1", "--rank=4", "--tokens=8"]
pytestmark = pytest.mark.skipif(not STATUS.exists(), reason="peaks of memory are read from Linux's /proc")


@pytest.fixture(autouse=True)
def _small_geometry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_7b, "PRESET", "tiny")


def test_the_model_has_values_everywhere_and_different_ones() -> None:
    """Built without values first: no tensor may stay that way, and buffers such as rotations must be right."""
    model = build_model(2)
    assert len(model.model.layers) == 2
    for name, param in model.named_parameters():
        assert param.dtype == torch.bfloat16, name
        assert param.device.type == "cpu", name
        assert torch.isfinite(param).all(), name
        assert param.dim() == 1 or 0.01 < param.float().std() < 0.03, name
    inverse = model.model.rotary_emb.inv_freq
    assert inverse[0] == 1.0
    assert (inverse.diff() < 0).all()


@pytest.mark.parametrize("method", real_7b.METHODS)
def test_steps_are_timed_and_planned_and_the_last_one_is_of_other_layers(
    method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A draw of three layers' one, then another; the plan holds the weights and more than they."""
    # Seeds whose first two draws differ.
    seed = {"owlore": "1", "lisa": "2"}[method]
    assert main([*TINY, "--method", method, "--seed", seed, "--steps=3", "--json", "--debug"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert rows[0]["active_layers"] == rows[1]["active_layers"] != rows[2]["active_layers"]
    assert rows[0]["planned_bytes"] <= rows[2]["planned_bytes"]
    weights = sum(param.nbytes for param in build_model(3).parameters())
    assert weights < rows[0]["planned_bytes"] < 3 * weights
    for row in rows:
        assert row["step_s"] == pytest.approx(row["forward_s"] + row["backward_s"] + row["optimizer_s"])
        assert row["peak_resident_bytes"] >= row["resident_bytes"] > 1 << 20
        assert 0 < row["loss"] < 20


def test_rows_are_recorded_only_when_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(result_rows, "RESULTS", tmp_path)
    assert main([*TINY, "--steps=1"]) == 0
    assert not list(tmp_path.iterdir())
    assert main([*TINY, "--steps=1", "--record"]) == 0
    assert [row["ran_on"] for row in result_rows.read_rows("real_7b")] == ["cpu"]


@pytest.mark.parametrize("codes", ["device", "files"])
def test_masters_in_files_are_planned_and_measured_without_them(
    codes: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights are mapped from files that are gone in the end; codes may be in one too, which the plan knows."""
    folder, where = tmp_path / "some", [f"--resting-where={tmp_path}"] if codes == "files" else []
    flags = ["--resting=nf4", f"--masters={folder}", *where, "--steps=2", "--seed=1", "--json", "--debug"]
    assert main([*TINY, *flags]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    weights = sum(param.nbytes for param in build_model(3).parameters())
    assert (rows[-1]["masters"], rows[-1]["resting_where"]) == ("files", codes)
    assert (rows[-1]["code_bytes_read"] > 0) == (codes == "files")
    assert rows[-1]["master_bytes_written"] > 0
    assert 0.2 * weights < rows[0]["planned_bytes"] < weights
    assert rows[-1]["peak_anonymous_growth_bytes"] > 0
    assert not any(folder.iterdir())


def test_a_model_that_is_mapped_is_the_one_in_memory(tmp_path: Path) -> None:
    mapped, plain = build_model(2, tmp_path / "model"), build_model(2)
    assert mapped.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(value, mapped.state_dict()[key]) for key, value in plain.state_dict().items())


BAD = {
    "method": (["--method", "lora"], "unknown method"),
    "layers": (["--layers", "0"], "--layers 0"),
    "active": (["--active-layers", "4"], "active_layers is 4"),
    "rank": (["--rank", "1000"], "rank 1000"),
    "masters": (["--masters", "somewhere"], "give --resting too"),
    "taken": (["--resting", "nf4", "--masters", __file__], "cannot be made"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_exit_code_2(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags, named = BAD[case]
    assert main([*TINY, *flags]) == 2
    assert named in capsys.readouterr().err
