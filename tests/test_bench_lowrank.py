"""The layer benchmark: forms of one layer, updates of one matrix, rows with numbers or reasons, and the command."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from bench import lowrank_layers, lowrank_updates
from bench import rows as result_rows
from bench.lowrank import lacking_memory, main, measure_layers, measure_updates
from bench.lowrank_cases import Case, OneLayer, parse_shapes
from bench.lowrank_layers import LayerRow, RunningLayer, with_ratios
from bench.lowrank_table import LAYER_COLUMNS, UPDATE_COLUMNS, layer_cells, print_rows, update_cells
from bench.lowrank_updates import Reading, RunningUpdate, UpdateRow
from lisa_kernels import cli
from lisa_kernels.errors import InputError

TINY = Case("cpu", "fp32", 24, 40, tokens=32, rank=8, lora_rank=2)
FLAGS = ["--shapes=24x40", "--tokens=32", "--rank=8", "--lora-rank=2", "--rounds=2", "--device=cpu", "--dtype=fp32"]
FORMS = {one.name: one for one in lowrank_layers.CONTESTANTS}
UPDATES = {one.name: one for one in lowrank_updates.CONTESTANTS}


def test_shapes_are_read() -> None:
    assert parse_shapes("768x2048, 4096×11008") == [(768, 2048), (4096, 11008)]


@pytest.mark.parametrize("text", ["", "768", "0x4", "3x4x5", "axb", "-1x4", "9999999x4"])
def test_a_shape_that_is_none_is_an_error(text: str) -> None:
    with pytest.raises(InputError, match="--shapes"):
        parse_shapes(text)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_form_computes_the_same_layer(name: str, dtype: str) -> None:
    """A form that skipped the product would be the fastest of all."""
    case = replace(TINY, dtype=dtype)
    weight, x = case.weight(), case.numbers(5, 24).requires_grad_()
    wanted = x.detach().double() @ weight.double().t()
    y = FORMS[name].build(case, weight.clone())(x)
    tolerance = 1e-4 if dtype == "fp32" else 0.05
    torch.testing.assert_close(y.double(), wanted, rtol=tolerance, atol=tolerance)
    y.backward(torch.ones_like(y))
    assert x.grad is not None
    gradient = weight.double().sum(0).expand(5, -1)
    torch.testing.assert_close(x.grad.double(), gradient, rtol=tolerance, atol=4 * tolerance)


TRAINS = {
    "torch-trained": {(40, 24)}, "torch-frozen": set(), "frozen": set(), "low-rank": {(8, 40)}, "lora-fa": {(2, 40)},
    "peft-lora": {(2, 24), (40, 2)}, "peft-lora-fa": {(40, 2)},
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_every_form_trains_what_its_name_says(name: str) -> None:
    model = FORMS[name].build(TINY, TINY.weight())
    x = TINY.numbers(5, 24).requires_grad_()
    model(x).sum().backward()
    trained = {tuple(param.shape) for param in model.parameters() if param.grad is not None}
    assert trained == TRAINS[name]


def test_saved_bytes_are_those_of_the_formulas() -> None:
    """Trained: the input. Frozen: nothing. Low rank and LoRA-FA: rank × tokens. peft's LoRA: its input and x Aᵀ."""
    rows = {row.name: row for row in measure_layers(TINY, 2)}
    x, projected, adapter = 32 * 24 * 4, 32 * 8 * 4, 32 * 2 * 4
    wanted = {
        "torch-trained": x, "torch-frozen": 0, "frozen": 0, "low-rank": projected, "lora-fa": adapter,
        "peft-lora-fa": adapter,
    }  # fmt: skip
    assert {name: rows[name].saved_bytes for name in wanted} == wanted
    assert rows["low-rank"].saved_ratio_to_torch_trained == pytest.approx(8 / 24)
    lora = rows["peft-lora"].saved_bytes
    assert lora is not None
    assert lora >= x + adapter


def test_rows_have_times_and_ratios_per_token() -> None:
    rows = measure_layers(TINY, 3)
    for row in rows:
        assert row.reason is None
        assert row.rounds == 3
        assert row.tokens == 32
        assert row.forward_ms is not None
        assert row.backward_p20_ms is not None
        assert row.backward_p80_ms is not None
        assert row.backward_p20_ms <= row.backward_p80_ms
    by_name = {row.name: row for row in rows}
    assert by_name["frozen"].backward_ratio_to_frozen == 1.0
    few = replace(by_name["torch-frozen"], tokens=8, backward_ms=10.0)
    many = replace(by_name["low-rank"], tokens=32, backward_ms=20.0)
    assert with_ratios([few, many])[1].backward_ratio_to_torch_frozen == pytest.approx(20 / 32 / (10 / 8))


def test_a_layer_that_would_take_minutes_is_timed_on_few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowrank_layers, "SECONDS_PER_LAYER", 0.0)
    running = RunningLayer(FORMS["torch-frozen"], TINY, TINY.weight(), 20)
    assert running.tokens == lowrank_layers.FEW_TOKENS
    assert running.rounds == lowrank_layers.LEAST_ROUNDS


@pytest.mark.parametrize("name", [name for name, one in UPDATES.items() if one.unavailable(TINY, True) is None])
def test_an_update_moves_the_weight_and_has_both_kinds_of_steps(name: str) -> None:
    weight = TINY.weight()
    before = weight.clone()
    running = RunningUpdate(UPDATES[name], TINY, weight, 2)
    assert not torch.equal(weight, before)
    running.read_clock()
    row = running.row()
    assert row.optimizer_ms is not None
    assert row.refresh_ms is not None
    assert row.update_ms == pytest.approx(row.optimizer_ms + row.refresh_ms / TINY.gap)


def test_a_refresh_is_spread_over_the_true_gap() -> None:
    running = RunningUpdate(UPDATES["attached"], TINY, TINY.weight(), 2)
    running.readings = [Reading(1.0, 9.0), Reading(1.0, 11.0), Reading(4.0, 10.0)]
    row = running.row()
    assert (row.optimizer_ms, row.refresh_ms) == pytest.approx((1e3, 1e4))
    assert row.update_ms == pytest.approx(1e3 + 1e4 / 200)


def test_an_svd_that_takes_minutes_is_left_out_unless_limits_are_off() -> None:
    large, peer = replace(TINY, inputs=4096, outputs=4096), replace(UPDATES["galore-torch"], package="torch")
    assert peer.unavailable(TINY, True) is None
    assert "--no-limits" in str(peer.unavailable(large, True))
    assert peer.unavailable(large, False) is None
    assert peer.unavailable(replace(large, device="cuda"), True) is None


def _refuse(*_: Any) -> Any:
    raise NotImplementedError("only on Tuesdays\nand other lines")


def test_a_peer_that_fails_is_a_row_with_the_reason_and_our_own_failure_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A failure of ours must never look like a peer that is not there."""
    peer = replace(FORMS["peft-lora"], build=_refuse)
    missing = replace(FORMS["peft-lora-fa"], package="not_a_package_of_anyone")
    monkeypatch.setattr(lowrank_layers, "CONTESTANTS", (peer, missing))
    reasons = ["NotImplementedError: only on Tuesdays", "not installed: pip install not_a_package_of_anyone"]
    assert [row.reason for row in measure_layers(TINY, 1)] == reasons
    monkeypatch.setattr(lowrank_updates, "CONTESTANTS", (replace(UPDATES["attached"], start=_refuse),))
    with pytest.raises(NotImplementedError):
        measure_updates(TINY, 1, True)


def test_what_does_not_fit_into_memory_is_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lacking_memory(TINY) is None
    monkeypatch.setattr("bench.lowrank.free_bytes", lambda device: 1 << 10)
    assert {"GiB" in str(row.reason) for row in measure_layers(TINY, 1)} == {True}


def test_the_model_of_one_layer_trains_the_weight_it_was_given() -> None:
    weight = torch.zeros(4, 3)
    layer = OneLayer(weight).layer
    assert isinstance(layer, nn.Linear)
    assert layer.weight.data_ptr() == weight.data_ptr()


def test_the_tables_have_a_line_for_every_row() -> None:
    layers, updates = measure_layers(TINY, 1), measure_updates(TINY, 1, True)
    updates.append(UpdateRow("cpu", "fp32", 24, 40, "x", "someone's", "", reason="too slow"))
    console = Console(width=200, record=True, file=io.StringIO())
    print_rows(layers, updates, console)
    text = console.export_text()
    assert "24 → 40" in text
    assert "too slow" in text
    assert all(row.layer in text for row in layers)
    assert all(len(layer_cells(row)) == len(LAYER_COLUMNS) for row in layers)
    assert all(len(update_cells(row)) == len(UPDATE_COLUMNS) for row in updates)


@pytest.mark.slow
def test_the_command_prints_json_and_draws_a_picture(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    plot = tmp_path / "layers.png"
    assert cli.main(["bench", "lowrank", *FLAGS, "--json", "--plot", str(plot)]) == 0
    rows = json.loads(capfd.readouterr().out)["rows"]
    assert [row["name"] for row in rows] == [*FORMS, *UPDATES]
    assert rows[0].keys() == asdict(LayerRow("cpu", "fp32", 1, 1, "", "", "")).keys()
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_rows_are_recorded_only_when_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(result_rows, "RESULTS", tmp_path)
    assert main(FLAGS) == 0
    assert not list(tmp_path.iterdir())
    assert main([*FLAGS, "--record"]) == 0
    rows = result_rows.read_rows("lowrank")
    assert [row["part"] for row in rows] == ["layer"] * len(FORMS) + ["update"] * len(UPDATES)


BAD = {
    "shape": (["--shapes", "24"], "--shapes '24'"),
    "dtype": (["--dtype", "fp23"], "did you mean 'fp32'"),
    "device": (["--device", "gpu"], "auto, cpu, cuda"),
    "rounds": (["--rounds", "0"], "--rounds 0"),
    "tokens": (["--tokens", "0"], "--tokens 0"),
    "rank": (["--rank", "25"], "--rank 25"),
    "picture": (["--plot", "layers.xyz"], "layers.xyz"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_exit_code_2(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags, named = BAD[case]
    assert main([*FLAGS, *flags]) == 2
    error = capsys.readouterr().err
    assert named in error
    assert "Traceback" not in error
