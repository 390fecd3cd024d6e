"""A given model's steps beside their plan: parts, counts, bytes, rows with numbers or reasons, the command's errors."""

from __future__ import annotations

import argparse
import io
import json
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import common
from rich.console import Console
from transformers import LlamaConfig

from bench import model_step, plots, step_clock
from bench.device_rates import MeasuredCard, Seen, known_card, seen_by_profiler, seen_in
from bench.model_step import Bench, ModelRow, measure, with_ratios
from bench.model_step_entries import LORA, Entry, parse_entries
from bench.model_step_table import COLUMNS, cells, print_rows
from bench.step import main
from bench.step_cases import Case
from bench.step_clock import PartsClock
from lisa_kernels import FullFineTune
from lisa_kernels.commands.bench import add_bench_step_options
from lisa_kernels.errors import InputError
from lisa_kernels.layers import checkpoint_blocks
from lisa_kernels.plan.machines import CARDS
from lisa_kernels.plan.rehearsal import Workload
from lisa_kernels.plan.work import Operation

CASE = Case(layers=3, rank=4, active_layers=2, lora_rank=2, galore_rank=4)
UNCOLLECTED = 256
# badam is measured where it is installed.
NAMES = ("lora", "peft-lora", "owlore-frozen", "torch-full", *(["badam"] if find_spec("badam") else []))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the configuration of a small Llama."""
    path = tmp_path_factory.mktemp("model")
    LlamaConfig(**common(num_hidden_layers=3)).save_pretrained(path)
    return path


def bench_of(folder: Path, **changes: Any) -> Bench:
    workload = Workload(str(folder), FullFineTune(), seq_len=8, dtype="fp32")
    cpu = torch.device("cpu")
    model = model_step.real_model(workload)
    given = {"machines": [CARDS["t4"]], "rounds": 2, "ends": time.monotonic() + 600, **changes}
    return Bench(workload, cpu, model, **given)


@pytest.fixture(scope="module")
def rows(folder: Path) -> dict[str, ModelRow]:
    """A run of some, which the tests below read."""
    bench = bench_of(folder)
    return {name: measure(bench, parse_entries(name, CASE)[0]) for name in NAMES}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_steps_taken_are_the_steps_planned(rows: dict[str, ModelRow], name: str) -> None:
    """Operation by operation and byte by byte, ours and peers'; no weight that others hold counts twice.

    A few numbers may wait in cycles until Python collects them, whenever that is.
    """
    row = rows[name]
    assert row.reason is None
    assert row.operations == row.planned_operations
    assert row.peak_bytes == pytest.approx(row.planned_bytes, abs=UNCOLLECTED)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_row_has_all_parts_and_what_was_predicted(rows: dict[str, ModelRow], name: str) -> None:
    row = rows[name]
    assert row.rounds == 2
    for part in step_clock.PARTS:
        assert getattr(row, f"{part}_ms") > 0
    assert row.step_ms is not None
    assert row.tokens_per_s == pytest.approx(8e3 / row.step_ms)
    assert (row.switch_ms is not None) == (name == "owlore-frozen")
    said = row.predicted["t4"]
    assert 0 < said["step_ms"][0] < said["step_ms"][1]
    assert set(said["parts_ms"]) == set(step_clock.PARTS)
    assert (said["switch_ms"] is not None) == (name == "owlore-frozen")


def test_what_is_computed_again_is_no_part_of_the_backward(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """One of three blocks recomputed: a clock that ticks at each look has one stretch of it, within the backward."""
    ticks = iter(range(100))
    monkeypatch.setattr(step_clock, "read_clock", lambda: lambda: float(next(ticks)))
    model, clock = bench_of(folder).model, PartsClock(torch.device("cpu"))
    checkpoint_blocks(model, 1, context_fn=clock.contexts)
    ids = torch.zeros(1, 4, dtype=torch.int64)
    clock.begin()
    clock.enter("forward")
    loss = model(input_ids=ids, labels=ids).loss
    clock.enter("backward")
    loss.backward()
    assert clock.seconds() == {"forward": 1.0, "recomputation": 1.0, "backward": 2.0, "optimizer": 0.0}


def test_what_cannot_run_is_a_row_with_the_reason(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No memory, no time, no package, a peer that fails; the plan is told where it was made."""
    entry = parse_entries("lora", CASE)[0]
    over = measure(bench_of(folder, ends=0.0), entry)
    assert over.reason == "the time was over"
    monkeypatch.setattr(model_step, "_free_bytes", lambda bench: 10)
    full = measure(bench_of(folder), entry)
    assert "0.0 kB are free" in str(full.reason)
    assert full.planned_bytes
    monkeypatch.undo()
    peer = parse_entries(LORA, CASE)[0]
    assert peer.peer is not None

    def fail(model: Any, case: Case) -> Any:
        raise NotImplementedError("only on Tuesdays\nand other lines")

    broken = replace(peer, peer=replace(peer.peer, start=fail))
    assert measure(bench_of(folder), broken).reason == "NotImplementedError: only on Tuesdays"
    monkeypatch.setattr("bench.model_step_entries.find_spec", lambda package: None)
    assert measure(bench_of(folder), peer).reason == "not installed: pip install peft"


def test_decompositions_that_take_minutes_are_left_out() -> None:
    big = torch.nn.Linear(4096, 11008, device="meta")
    entry = parse_entries("galore-torch", CASE)[0]
    assert entry.unavailable(big) is None
    assert "about 65 s" in str(entry.unavailable(torch.nn.Sequential(*_meta_linears(27))))


def _meta_linears(count: int) -> list[torch.nn.Linear]:
    return [torch.nn.Linear(4096, 11008, device="meta") for _ in range(count)]


@pytest.mark.slow
def test_ratios_need_their_yardstick(rows: dict[str, ModelRow]) -> None:
    found = {row.name: row.ratio_to_peft_lora for row in with_ratios(list(rows.values()))}
    assert found[LORA] == 1.0
    assert all(found.values())
    assert with_ratios([rows["lora"]])[0].ratio_to_peft_lora is None


@pytest.mark.slow
def test_tables_and_pictures_have_every_row(rows: dict[str, ModelRow], tmp_path: Path) -> None:
    console = Console(width=300, record=True, file=io.StringIO())
    all_rows = [*rows.values(), replace(rows["lora"], name="left out", step_ms=None, reason="why not")]
    print_rows(all_rows, console)
    text = console.export_text()
    assert all(row.name in text for row in all_rows)
    assert "why not" in text
    assert {len(cells(row, ["t4"])) for row in all_rows} == {len(COLUMNS) + 2}
    plots.plot_model_steps([vars(row) for row in all_rows], tmp_path / "steps.png")
    assert (tmp_path / "steps.png").read_bytes().startswith(b"\x89PNG")


def test_a_profile_is_counted_by_what_ran_where() -> None:
    """The wait that ends the profile is not the step's; without any event of a device nothing is told."""

    def event(name: str, where: str) -> Any:
        return SimpleNamespace(name=name, device_type=f"DeviceType.{where}")

    host = [event(name, "CPU") for name in ("cudaLaunchKernel", "cudaMalloc", "cudaDeviceSynchronize", "aten::mm")]
    assert seen_in(host) is None
    device = [event(name, "CUDA") for name in ("gemm", "add", "Memcpy DtoH")]
    waited = [event("cudaStreamSynchronize", "CPU")]
    assert seen_in([*host, *device]) == Seen(launches=2, copies=1, waits=0, allocations=1)
    assert seen_in([*host, *waited, *device]) == Seen(2, 1, 1, 1)
    assert seen_by_profiler(lambda: None, torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("said", "known"),
    [
        ("NVIDIA GeForce RTX 4090", "rtx-4090"), ("NVIDIA A100-SXM4-80GB", "a100"), ("NVIDIA H100 80GB HBM3", "h100"),
        ("Tesla T4", "t4"), ("NVIDIA L4", "l4"), ("NVIDIA GeForce RTX 4060 Ti", "rtx-4060-ti"),
        ("NVIDIA GeForce RTX 4060", None), ("NVIDIA L40", None), ("NVIDIA GeForce RTX 3060 Ti", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA GeForce RTX 4090 D", None), ("NVIDIA H200", None),
    ],
)  # fmt: skip
def test_a_card_is_known_by_what_its_driver_calls_it(said: str, known: str | None) -> None:
    found = known_card(said)
    assert (None if found is None else found.name) == known


def test_measured_rates_bound_each_operation() -> None:
    card = MeasuredCard(copy_gb_s=1000, tflops=100, tflops_fp32=10, launch_us=2, host_us=5)

    def operation(products: int, moved: int, halves: bool = True) -> Operation:
        return Operation("", ("", (), {}), products, moved, halves)

    assert card.seconds(operation(10**12, 10**6)) == ((0.01, 0.01 / 0.75), "matrices")
    assert card.seconds(operation(10**12, 10**6, halves=False))[0].low == 0.1
    assert card.seconds(operation(0, 10**9)) == ((0.001, 0.001 / 0.75), "bandwidth")
    assert card.seconds(operation(0, 8)) == ((2e-6, 2e-6), "launches")
    assert card.host_seconds(100) == pytest.approx((5e-4, 1e-3))


@pytest.mark.slow
def test_the_command_leaves_rows_to_be_sent(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    """Machine, then a row for each; this CPU predicts as well."""
    file = tmp_path / "rows.jsonl"
    given = [f"--model={folder}", "--device=cpu", "--seq-len=8", "--rank=4", "--active-layers=2", "--galore-rank=4"]
    assert main([*given, "--gradient-checkpointing=1", "--methods=lora,peft-lora", f"--output={file}", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)["rows"]
    machine, *rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert machine["kind"] == "machine"
    assert machine["versions"]["torch"] == torch.__version__
    assert [row["name"] for row in rows] == ["lora", "peft-lora"]
    assert printed == [{key: value for key, value in row.items() if key != "kind"} for row in rows]
    assert rows[0]["recomputed_blocks"] == 1
    assert set(rows[0]["predicted"]) == {"this CPU"}


@pytest.mark.slow
def test_each_method_recomputes_as_few_blocks_as_a_size_takes(folder: Path) -> None:
    """By its own plan: none where there is room, all where there is too little, and between them what fits."""
    given = [f"--model={folder}", "--device=cpu", "--seq-len=64", "--rank=4", "--active-layers=2", "--galore-rank=4"]

    def bench(*more: str) -> tuple[model_step.Bench, Entry]:
        parser = argparse.ArgumentParser()
        add_bench_step_options(parser)
        found, entries = model_step.prepare_bench(
            parser.parse_args([*given, "--methods=lora", *more]), Console(quiet=True)
        )
        return found, entries[0]

    def planned(blocks: int) -> int:
        found, entry = bench(f"--gradient-checkpointing={blocks}")
        return model_step._planned(found, entry, model_step._identity(found, entry))[1]

    room = [planned(blocks) for blocks in range(4)]
    assert room[0] > room[1] > room[3]
    found, entry = bench("--gradient-checkpointing=auto")
    assert found.budget == 0
    row = model_step._identity(found, entry)
    chosen = [model_step._filling(found, entry, row, size) for size in (room[0], room[1], room[3] - 1)]
    assert [(each.gradient_checkpointing, each.checkpointed_blocks) for each in chosen] == [
        (False, None), (True, 1), (True, 3)
    ]  # fmt: skip
    assert bench("--gradient-checkpointing=2GB")[0].budget == 2_000_000_000


BAD = {
    "method": (["--methods", "lorra"], "did you mean 'lora'"),
    "dtype": (["--dtype", "fp23"], "did you mean 'fp32'"),
    "rounds": (["--rounds", "0"], "--rounds 0"),
    "device": (["--device", "gpu"], "auto, cpu, cuda"),
    "picture": (["--plot", "steps.xyz"], "steps.xyz"),
    "model": (["--model", "preset:tinny"], "did you mean 'tiny'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_exit_code_2(
    case: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    flags, named = BAD[case]
    assert main([f"--model={folder}", "--device=cpu", *flags]) == 2
    error = capsys.readouterr().err
    assert named in error
    assert "Traceback" not in error


def test_rows_that_cannot_be_written_are_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="rows could not be written"):
        model_step._write(tmp_path / "file" / "rows.jsonl", [{"kind": "machine"}])
