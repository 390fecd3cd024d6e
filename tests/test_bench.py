"""The optimizer benchmark and its command: sizes, turns, rows with numbers or reasons, bytes, and errors."""

from __future__ import annotations

import io
import itertools
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from bench import rows as result_rows
from bench.held_bytes import extra_bytes, state_bytes
from bench.optimizer import Case, Entry, lacking_memory, main, measure, parse_sizes, why_not
from bench.optimizer_cases import Row
from bench.optimizer_table import COLUMNS, cells, print_rows
from bench.peers import CONTESTANTS, parse_peers
from bench.timing import interleave, spread
from lisa_kernels import cli
from lisa_kernels.commands import bench as bench_command
from lisa_kernels.errors import InputError

QUIET = Console(quiet=True)
TINY = ["--sizes", "2^12", "--rounds", "2", "--device", "cpu", "--peers", "none"]


@pytest.fixture(autouse=True)
def _small_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.timing.COPY_BYTES", 1 << 20)
    monkeypatch.setattr("bench.optimizer.COPY_BYTES", 1 << 20)


SIZES = {
    "2^12": [1 << 12],
    "1000": [1000],
    "2^24,2^20, 7": [7, 1 << 20, 1 << 24],
    "2^12..2^16": [1 << 12, 1 << 14, 1 << 16],
    "2^12..2^15": [1 << 12, 1 << 14, 1 << 15],
    "2^12,2^12..2^14": [1 << 12, 1 << 14],
}


@pytest.mark.parametrize("text", SIZES)
def test_sizes_are_read(text: str) -> None:
    """Powers, numbers, lists and ranges in factors of 4 whose last size is always run."""
    assert parse_sizes(text) == SIZES[text]


@pytest.mark.parametrize("text", ["", "0", "2^35", "-4", "3^4", "2^20;2^24", "2^14..2^12", "1..2..3", "2^12..", "1e6"])
def test_a_size_that_is_none_is_an_error(text: str) -> None:
    with pytest.raises(InputError, match="--sizes"):
        parse_sizes(text)


def test_peers_are_chosen_by_name_and_ours_always_run() -> None:
    assert [one.name for one in parse_peers("none")] == ["stochastic", "nearest"]
    assert [one.name for one in parse_peers("torchao, bitsandbytes")] == [
        "stochastic", "nearest", "bitsandbytes", "torchao",
    ]  # fmt: skip
    assert [one.name for one in parse_peers("all")] == list(CONTESTANTS)


def test_everyone_takes_a_turn_in_every_round_and_another_begins() -> None:
    """The order of readings: rotated by one from round to round; fewer rounds are spread over the run."""
    order: list[str] = []
    ticks = itertools.count()

    def clock(name: str) -> Any:
        def read() -> float:
            order.append(name)
            return float(next(ticks))

        return read

    readings = interleave([clock("a"), clock("b"), clock("c")], [4, 4, 2])
    assert "".join(order) == "ab" + "bca" + "ab" + "abc"
    assert readings == [[0.0, 4.0, 5.0, 7.0], [1.0, 2.0, 6.0, 8.0], [3.0, 9.0]]


def test_the_spread_is_the_named_percentiles() -> None:
    assert spread([float(value) for value in range(101)]) == pytest.approx((20.0, 50.0, 80.0))


def tiny_run(*names: str, case: Case | None = None) -> list[Row]:
    entries = [Entry(CONTESTANTS[name], "fp32") for name in names]
    return measure(case or Case("cpu", 1 << 12), entries, 2, True, QUIET)


def test_a_row_agrees_with_itself() -> None:
    """Bytes and ratios follow from the formats: 16.06 bytes moved with 8-bit state, 28 with torch's."""
    ours, fused = tiny_run("stochastic", "torch-fused")
    assert ours.moved_bytes_per_element == pytest.approx(16.06, abs=0.02)
    assert ours.state_bytes_per_element == pytest.approx(2.03, abs=0.01)
    assert fused.moved_bytes_per_element == pytest.approx(28, abs=0.01)
    assert fused.ratio_to_torch_fused_fp32 == 1.0
    for row in (ours, fused):
        assert row.rounds == 2
        assert row.p20_ms is not None
        assert row.p50_ms is not None
        assert row.p80_ms is not None
        assert 0 < row.p20_ms <= row.p50_ms <= row.p80_ms
        assert row.ns_per_element == pytest.approx(row.p50_ms * 1e6 / (1 << 12))
        assert row.gb_s is not None
        assert row.copy_gb_s is not None
        assert row.copy_share == pytest.approx(row.gb_s / row.copy_gb_s)


def test_many_small_tensors_are_one_case() -> None:
    row = tiny_run("stochastic", case=Case("cpu", 64, 10))[0]
    assert (row.elements, row.tensors) == (640, 10)
    assert row.p50_ms is not None
    assert row.ratio_to_torch_fused_fp32 is None


def test_a_missing_package_is_a_row_with_the_reason() -> None:
    missing = replace(CONTESTANTS["torchao"], package="not_a_package_of_anyone")
    rows = measure(Case("cpu", 1 << 12), [Entry(missing, "bf16")], 2, True, QUIET)
    assert [(row.optimizer, row.reason) for row in rows] == [
        ("torchao AdamW8bit", "not installed: pip install not_a_package_of_anyone")
    ]
    assert rows[0].p50_ms is None


def _refuse(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    raise NotImplementedError("only on Tuesdays\nand other lines")


def test_a_peer_that_fails_is_a_row_with_the_reason_and_our_own_failure_is_an_error() -> None:
    """A failure of ours must never look like a peer that is not there."""
    row = measure(Case("cpu", 64), [Entry(replace(CONTESTANTS["torch-fused"], start=_refuse), "fp32")], 2, True, QUIET)
    assert row[0].reason == "NotImplementedError: only on Tuesdays"
    with pytest.raises(NotImplementedError):
        measure(Case("cpu", 64), [Entry(replace(CONTESTANTS["stochastic"], start=_refuse), "fp32")], 2, True, QUIET)


def test_slow_peers_stop_at_their_limit_unless_limits_are_off() -> None:
    slow = Entry(replace(CONTESTANTS["torch-foreach"], most_elements_on_cpu=1 << 20, most_tensors_on_cpu=10), "fp32")
    assert why_not(slow, Case("cpu", 1 << 20)) is None
    assert "2^20" in str(why_not(slow, Case("cpu", (1 << 20) + 1)))
    assert "10 tensors" in str(why_not(slow, Case("cpu", 1, 11)))
    assert why_not(slow, Case("cuda", 1 << 24)) is None
    assert why_not(slow, Case("cpu", 1 << 24), limits=False) is None


def test_what_needs_cuda_says_so() -> None:
    flash = Entry(replace(CONTESTANTS["flashoptim"], package="torch"), "bf16")
    assert why_not(flash, Case("cpu", 64)) == "needs CUDA"
    assert why_not(flash, Case("cuda", 64)) is None


def test_cases_that_do_not_fit_into_memory_are_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [Entry(CONTESTANTS["torch-fused"], "fp32")]
    monkeypatch.setattr("bench.optimizer.free_bytes", lambda device: 20 << 20)
    assert lacking_memory(entries, Case("cpu", 1 << 16)) is None
    reason = str(lacking_memory(entries, Case("cpu", 1 << 20)))
    assert "GiB" in reason
    rows = tiny_run("torch-fused", case=Case("cpu", 1 << 20))
    assert [row.reason for row in rows] == [reason]


class Wrapped:
    """As FlashOptim's state: tensors behind an object."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        self.codes, self.scales = tensors


def test_state_bytes_counts_every_storage_once() -> None:
    """Plain tensors, tensors in objects, and a table that several entries share."""
    param, table = nn.Parameter(torch.zeros(100)), torch.zeros(256)
    optimizer = torch.optim.SGD([param])
    optimizer.state[param] = {
        "step": 3, "qmap1": table, "qmap2": table[:10],
        "m": Wrapped(torch.zeros(100, dtype=torch.uint8), torch.zeros(2)),
    }  # fmt: skip
    assert state_bytes(optimizer) == 1024 + 100 + 8


def test_extra_bytes_sees_the_most_that_is_held_at_one_time() -> None:
    def step() -> None:
        for _ in range(3):
            first = torch.empty(1 << 20, dtype=torch.uint8)
            second = torch.empty(1 << 19, dtype=torch.uint8)
            del first, second

    assert extra_bytes(step, "cpu") >= 3 << 19
    assert extra_bytes(step, "cpu") < 1 << 24
    assert extra_bytes(lambda: None, "cpu") < 1 << 20


def test_the_table_has_a_line_for_every_row() -> None:
    rows = [*tiny_run("stochastic"), *tiny_run("flashoptim")]
    console = Console(width=200, record=True, file=io.StringIO())
    print_rows(rows, console)
    text = console.export_text()
    assert "2^12 elements" in text
    assert "AdamW8bit" in text
    assert rows[1].reason is not None
    assert rows[1].reason in text
    assert all(len(cells(row)) == len(COLUMNS) for row in rows)


def test_the_command_prints_json_and_draws_a_picture(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Through the command line and its process: ours in two roundings and two dtypes, and the yardstick."""
    plot = tmp_path / "sizes.png"
    assert cli.main(["bench", "optimizer", *TINY, "--json", "--plot", str(plot)]) == 0
    result = json.loads(capfd.readouterr().out)
    assert len(result["rows"]) == 5
    assert result["rows"][0].keys() == asdict(tiny_run("flashoptim")[0]).keys()
    assert "torch" in result["environment"]["versions"]
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_rows_are_recorded_only_when_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(result_rows, "RESULTS", tmp_path)
    assert main([*TINY, "--dtype", "fp32"]) == 0
    assert not list(tmp_path.iterdir())
    assert main([*TINY, "--dtype", "fp32", "--record"]) == 0
    rows = result_rows.read_rows("optimizer")
    assert [row["name"] for row in rows] == ["stochastic", "nearest", "torch-fused"]
    assert all(row["commit"] and row["versions"]["torch"] for row in rows)


BAD = {
    "size": (["--sizes", "2^99"], "2^99"),
    "dtype": (["--dtype", "fp23"], "did you mean 'fp32'"),
    "peer": (["--peers", "torchoa"], "did you mean 'torchao'"),
    "device": (["--device", "gpu"], "auto, cpu, cuda"),
    "rounds": (["--rounds", "0"], "--rounds 0"),
    "threads": (["--threads", "-1"], "--threads -1"),
    "picture": (["--plot", "sizes.xyz"], "sizes.xyz"),
    "folder": (["--plot", "no/such/folder/sizes.png"], "folder"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_exit_code_2(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags, named = BAD[case]
    assert main([*TINY, *flags]) == 2
    error = capsys.readouterr().err
    assert named in error
    assert "Traceback" not in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here, so asking for one is no mistake")
def test_a_gpu_that_is_not_there_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "--device", "cuda"]) == 2
    assert "give --device cpu" in capsys.readouterr().err


def test_without_the_sources_the_command_says_where_to_get_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in a wheel, which holds the package and no benchmarks."""
    place = tmp_path / "lisa_kernels" / "commands"
    place.mkdir(parents=True)
    monkeypatch.setattr(bench_command, "__file__", shutil.copy(bench_command.__file__, place))
    assert cli.main(["bench", "optimizer", "--json"]) == 2
    assert "not part of the installed package" in capsys.readouterr().err


def test_help_names_units_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "optimizer", "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for word in (
        "--sizes",
        "--small-tensors",
        "--no-limits",
        "--record",
        "elements",
        "ns per element",
        "(default: 20)",
    ):
        assert word in text
