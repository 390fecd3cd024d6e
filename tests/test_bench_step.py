"""The step benchmark: draws, parts, refreshes, bytes, rows with numbers or reasons, the command and its errors."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from bench import rows as result_rows
from bench import step_contestants
from bench.held_bytes import held_bytes, saved_for_backward
from bench.step import lacking_memory, main, measure
from bench.step_cases import LLAMA_2_7B_SCORES, Case, on_the_same_weights
from bench.step_contestants import CONTESTANTS, CYCLE, captures, parse_methods, repeated_refreshes, representative_seed
from bench.step_runs import Draw, Finding, Row, Running, Step, with_ratios
from bench.step_table import COLUMNS, cells, print_rows
from bench.timing import seconds_of_parts
from lisa_kernels import OwLore, cli
from lisa_kernels.errors import InputError
from lisa_kernels.samplers import UniformSampler

QUIET = Console(quiet=True)
TINY = Case(
    layers=4, width=16, intermediate=24, heads=2, vocabulary=32, batch=2, seq_len=8, rank=4, active_layers=2,
    lora_rank=2, galore_rank=4,
)  # fmt: skip
FLAGS = [
    "--layers=4", "--width=16", "--intermediate=24", "--heads=2", "--vocabulary=32", "--batch=2", "--seq-len=8",
    "--rank=4", "--active-layers=2", "--lora-rank=2", "--galore-rank=4", "--rounds=2", "--device=cpu",
]  # fmt: skip
OURS = [name for name, contestant in CONTESTANTS.items() if not contestant.is_peer]


@pytest.fixture(autouse=True)
def _short_periods(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_contestants, "PERIOD", 6)


def tiny_run(*names: str, rounds: int = 2, case: Case = TINY) -> list[Row]:
    return measure(case, [CONTESTANTS[name] for name in names], rounds, QUIET)


def tiny_running(name: str, rounds: int = 2) -> Running:
    trainee = CONTESTANTS[name].start(TINY.model(), TINY, rounds)
    return Running(CONTESTANTS[name], TINY, trainee, TINY.tokens_and_labels())


def test_contestants_are_chosen_by_name_and_by_group() -> None:
    assert [one.name for one in parse_methods("all")] == list(CONTESTANTS)
    assert [one.name for one in parse_methods("peft-lora, lisa")] == ["lisa", "peft-lora"]
    assert {one.is_peer for one in parse_methods("ours")} == {False}
    assert {one.is_peer for one in parse_methods("peers")} == {True}
    with pytest.raises(InputError, match="did you mean 'peft-lora'"):
        parse_methods("peft-lra")


def test_the_published_scores_are_stretched_over_the_layers() -> None:
    """As they are for 32 layers; first layers stay the heaviest on 12."""
    assert replace(TINY, layers=32, scores="llama-2-7b").layer_scores() == pytest.approx(LLAMA_2_7B_SCORES)
    scores = replace(TINY, layers=12, scores="llama-2-7b").layer_scores()
    assert len(scores) == 12
    assert max(scores) == scores[0]
    assert TINY.layer_scores() == (1.0,) * 4


def test_contestants_share_the_weights_and_nothing_else() -> None:
    model = TINY.model()
    copies = [on_the_same_weights(model) for _ in range(2)]
    assert held_bytes([*model.parameters(), *copies[0].parameters()]) == held_bytes(model.parameters())
    first, second = (next(copy.parameters()) for copy in copies)
    assert first is not second
    first.requires_grad_(False)
    assert second.requires_grad


def test_the_chosen_draws_lie_as_deep_as_all_draws_do_and_end_with_the_deepest() -> None:
    """The backward's length depends on the lowest layer; eight draws of any seed may be off by a layer."""
    seed, mean = representative_seed(lambda seed: UniformSampler(12, 5, seed), 8)
    lowest = [min(UniformSampler(12, 5, seed).draw(number)) for number in range(1, 11)]
    assert mean == pytest.approx(13 / 6 - 1, abs=0.1)  # (layers + 1) / (active + 1), counted from 0
    assert sum(lowest[:8]) / 8 == pytest.approx(mean, abs=0.13)
    assert lowest[8:] == [0, 0]
    others = [
        abs(sum(min(UniformSampler(12, 5, seed).draw(number)) for number in range(1, 9)) / 8 - mean)
        for seed in range(20)
    ]
    assert max(others) > 0.5


def test_refreshes_are_counted_over_true_periods() -> None:
    """With a gap of one step all later steps of a period find as many bases as its first, where all layers train."""
    method = OwLore(4, 6, rank=4, scores=(1.0,) * 4, embeddings="frozen", gap=1)
    assert repeated_refreshes(method, TINY, 6) == 5
    assert 0 <= repeated_refreshes(replace(method, active_layers=1, gap=0), TINY, 6) < 5


@pytest.mark.parametrize("name", OURS)
def test_a_plain_step_finds_no_basis(name: str) -> None:
    """New bases are counted apart: the steps between draws' ends must hold none, whatever the method."""
    running = tiny_running(name)
    seen = []
    running.trainee.model.register_forward_pre_hook(lambda model, args: seen.append(len(captures(model))))
    running.read_clock()
    running.read_clock()
    cycle = running.trainee.cycle
    plain = [found for place, found in enumerate(seen) if place % cycle > 1] if cycle > 1 else seen
    assert plain
    assert set(plain) == {0}


def test_first_steps_of_a_draw_find_the_bases() -> None:
    """Otherwise the refresh column would hold no refreshes without anyone noticing."""
    running = tiny_running("owlore-frozen", rounds=4)
    seen = []
    running.trainee.model.register_forward_pre_hook(lambda model, args: seen.append(len(captures(model))))
    for _ in range(4):
        running.read_clock()
    assert sum(seen[::CYCLE]) > 0
    assert len(captures(CONTESTANTS["galore"].start(TINY.model(), TINY, 1).model)) > 0


def a_draw(first: Finding, second: Finding, switch: float = 0.0, lowest: int = 0, saved: int = 10) -> Draw:
    return Draw(Step(1.0, 2.0, 3.0), first, second, switch, lowest, saved, 1 << 30)


def test_what_only_some_steps_do_is_spread_over_the_period() -> None:
    """(first + repeats · bases · what a basis found again takes + switch) / period."""
    running = tiny_running("owlore-frozen")
    nothing = Finding(6.0, 0)
    running.draws = [a_draw(Finding(14.0, 7), nothing, 2.0), a_draw(Finding(10.0, 7), nothing, 0.0, 1, 20)]
    running.trainee.period, running.trainee.repeats = 10, 0.0
    row = running.row()
    assert row.refresh_ms == pytest.approx((6 + 1) / 10 * 1e3)
    assert row.step_ms == pytest.approx(6e3 + 0.7e3)
    assert row.tokens_per_s == pytest.approx(16 / 6.7)
    assert (row.saved_bytes, row.lowest_layer) == (15, 0.5)
    running.trainee.repeats = 2.0
    assert running._refresh_seconds() == pytest.approx((6 + 2 * 6 + 1) / 10)
    running.draws = [a_draw(Finding(12.0, 7), Finding(8.0, 4))]
    assert running._refresh_seconds() == pytest.approx((6 + 2 * 7 * 2 / 4) / 10)


def test_without_draws_every_basis_is_found_once_in_a_period() -> None:
    """galore-torch decomposes all in its first step and every 200th; ours finds them again one by one."""
    running = tiny_running("torch-full")
    running.draws = [a_draw(Finding(406.0, 0), Finding(6.0, 0))]
    assert running._refresh_seconds() == 0.0
    running.trainee.period = 200
    assert running._refresh_seconds() == pytest.approx(400 / 200)
    running.trainee.matrices = 28
    running.draws = [a_draw(Finding(406.0, 28), Finding(20.0, 7))]
    assert running._refresh_seconds() == pytest.approx(28 * 14 / 7 / 200)


@pytest.fixture(scope="module")
def everyone() -> Iterator[dict[str, Row]]:
    """A run of all contestants, which the tests below read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_contestants, "PERIOD", 6)
        yield {row.name: row for row in tiny_run(*CONTESTANTS)}


@pytest.mark.slow
@pytest.mark.parametrize("name", CONTESTANTS)
def test_every_row_has_numbers_or_a_reason(everyone: dict[str, Row], name: str) -> None:
    """Parts add up to the step, the step lies beside its percentiles, ours always run."""
    row = everyone[name]
    if row.step_ms is None:
        assert row.reason
        assert name not in OURS
        return
    parts = (row.forward_ms, row.backward_ms, row.optimizer_ms, row.refresh_ms)
    assert sum(part or 0.0 for part in parts) == pytest.approx(row.step_ms)
    assert None not in parts
    assert row.tokens_per_s == pytest.approx(16 / row.step_ms * 1e3)
    assert row.p20_ms is not None
    assert row.p80_ms is not None
    assert row.p20_ms <= row.p80_ms
    assert row.saved_bytes is not None
    assert row.state_bytes is not None
    assert row.peak_bytes is not None
    assert row.saved_bytes > 0
    assert row.peak_bytes > row.state_bytes
    full = everyone["torch-full"].step_ms
    assert full is not None
    assert row.ratio_to_full == pytest.approx(row.step_ms / full)


@pytest.mark.slow
def test_bytes_follow_from_what_trains(everyone: dict[str, Row]) -> None:
    """torch's AdamW keeps two moments of every weight; frozen layers below the lowest active one save nothing."""
    weights = held_bytes(TINY.model().parameters())
    full, frozen, always = (everyone[name] for name in ("torch-full", "owlore-frozen", "owlore-always"))
    assert full.state_bytes == pytest.approx(2 * weights, rel=0.02)
    assert full.peak_bytes is not None
    assert full.peak_bytes >= 4 * weights
    assert frozen.saved_bytes is not None
    assert always.saved_bytes is not None
    assert full.saved_bytes is not None
    assert frozen.saved_bytes < always.saved_bytes < full.saved_bytes
    assert frozen.peak_bytes is not None
    assert frozen.peak_bytes < full.peak_bytes


def test_saved_bytes_count_each_storage_once_and_no_parameter() -> None:
    layer, x = nn.Linear(8, 4, bias=False), torch.ones(16, 8, requires_grad=True)
    with saved_for_backward(layer.parameters()) as saved:
        (layer(x) * layer(x).detach()).sum()
    # x is saved twice, the detached output once; the product's other side wants no gradient.
    assert sum(saved.values()) == 16 * 8 * 4 + 16 * 4 * 4


def test_parts_are_timed_in_order() -> None:
    order: list[str] = []
    seconds = seconds_of_parts((lambda: order.append("a"), lambda: order.append("b")), "cpu")
    assert order == ["a", "b"]
    assert len(seconds) == 2
    assert min(seconds) >= 0


def test_one_thread_is_timed_by_its_own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a process that waits nothing counts; several threads would count several times over."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert seconds_of_parts((lambda: time.sleep(0.05),), "cpu")[0] < 0.025
    row = tiny_run("torch-full")[0]
    assert row.clock == "process"
    assert row.wall_ms is not None
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert seconds_of_parts((lambda: time.sleep(0.05),), "cpu")[0] >= 0.05


def test_a_missing_package_is_a_row_with_the_reason() -> None:
    missing = replace(CONTESTANTS["galore-torch"], package="not_a_package_of_anyone")
    row = measure(TINY, [missing], 1, QUIET)[0]
    assert row.reason == "not installed: pip install not-a-package-of-anyone"
    assert row.step_ms is None


def _refuse(model: Any, case: Case, rounds: int) -> Any:
    raise NotImplementedError("only on Tuesdays\nand other lines")


def test_a_peer_that_fails_is_a_row_with_the_reason_and_our_own_failure_is_an_error() -> None:
    """A failure of ours must never look like a peer that is not there."""
    row = measure(TINY, [replace(CONTESTANTS["torch-full"], start=_refuse)], 1, QUIET)[0]
    assert row.reason == "NotImplementedError: only on Tuesdays"
    with pytest.raises(NotImplementedError):
        measure(TINY, [replace(CONTESTANTS["lisa"], start=_refuse)], 1, QUIET)


def test_what_does_not_fit_into_memory_is_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    model = TINY.model()
    assert lacking_memory(TINY, model, [CONTESTANTS["torch-full"]]) is None
    monkeypatch.setattr("bench.step.free_bytes", lambda device: 1 << 10)
    row = tiny_run("torch-full")[0]
    assert "GiB" in str(row.reason)


def test_ratios_need_their_yardsticks() -> None:
    row = Row("cpu", "fp32", "", 1, 1, "lisa", "LISA", "", step_ms=2.0)
    lora, full = replace(row, name="peft-lora", step_ms=4.0), replace(row, name="torch-full", step_ms=None)
    assert [one.ratio_to_peft_lora for one in with_ratios([row, lora, full])] == [0.5, 1.0, None]
    assert [one.ratio_to_full for one in with_ratios([row, lora, full])] == [None, None, None]


@pytest.mark.slow
def test_the_table_has_a_line_for_every_row(everyone: dict[str, Row]) -> None:
    console = Console(width=250, record=True, file=io.StringIO())
    print_rows(list(everyone.values()), console)
    text = console.export_text()
    assert "4 layers, 16 wide" in text
    assert all(row.method.split(",")[0] in text for row in everyone.values())
    assert all(len(cells(row)) == len(COLUMNS) for row in everyone.values())


@pytest.mark.slow
def test_the_command_prints_json_and_draws_a_picture(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Through the command line and its process; what a peer prints must not reach the result."""
    plot = tmp_path / "steps.png"
    flags = ["--methods=lora-fa,torch-full,badam", *FLAGS, "--json", "--plot", str(plot)]
    assert cli.main(["bench", "step", *flags]) == 0
    result = json.loads(capfd.readouterr().out)
    assert [row["name"] for row in result["rows"]] == ["lora-fa", "torch-full", "badam"]
    assert result["rows"][0].keys() == asdict(Row("cpu", "fp32", "", 1, 1, "", "", "")).keys()
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_rows_are_recorded_only_when_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(result_rows, "RESULTS", tmp_path)
    assert main(["--methods=torch-full", *FLAGS]) == 0
    assert not list(tmp_path.iterdir())
    assert main(["--methods=torch-full", *FLAGS, "--record"]) == 0
    row = result_rows.read_rows("step")[0]
    assert (row["name"], row["ran_on"]) == ("torch-full", "cpu")
    assert row["settings"] == "active 2, rank 4, lora 2, galore 4, scores uniform"


BAD = {
    "method": (["--methods", "lorra-fa"], "did you mean 'lora-fa'"),
    "dtype": (["--dtype", "fp23"], "did you mean 'fp32'"),
    "scores": (["--scores", "unifrom"], "did you mean 'uniform'"),
    "device": (["--device", "gpu"], "auto, cpu, cuda"),
    "rounds": (["--rounds", "0"], "--rounds 0"),
    "layers": (["--layers", "0"], "--layers 0"),
    "active": (["--active-layers", "5"], "--active-layers 5"),
    "rank": (["--rank", "17"], "--rank 17"),
    "heads": (["--heads", "3"], "3 heads"),
    "threads": (["--threads", "-1"], "--threads -1"),
    "picture": (["--plot", "steps.xyz"], "steps.xyz"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_exit_code_2(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags, named = BAD[case]
    assert main([*FLAGS, *flags]) == 2
    error = capsys.readouterr().err
    assert named in error
    assert "Traceback" not in error


def test_help_names_units_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "step", "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for word in ("--methods", "--lora-rank", "--scores", "--record", "tokens per row", "(default: 8)"):
        assert word in text
