"""Compiled kernels keep their budgets, a broken budget is named, and time floors are the arithmetic they claim."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import pytest

from bench import kernels
from bench.kernels import GPUS, Floor, Gpu, Row, budget_of, exceeded, read_budgets, time_floor

FAST_TARGET = "sm_90"
FAST_KERNELS = [
    "adamw8/one/bf16-bf16",
    "adamw8/many/bf16-bf16",
    "adamw8/one/fp32-fp32",
    "grad_norm/bf16",
    "fold/bf16",
    "quantize/m",
]
# Codes of one tensor alone are as narrow as 4 of them, and partial results leave one by one.
WHOLLY_WIDE = [name for name in FAST_KERNELS if name.startswith(("adamw8", "fold"))]
# Of a fused step on 8-bit moments with bfloat16 weights and gradients, everything rounded stochastically: above this
# many instructions per element an H100 would wait for its schedulers, not for its memory.
INSTRUCTIONS_OF_A_STEP = 86


def row(**changes: object) -> Row:
    """Return a row as a measurement gives it, with some numbers changed."""
    plain = Row(
        kernel="adamw8",
        target="sm_90",
        bytes_per_element=10.0,
        registers=40,
        spill_bytes=0,
        local_accesses=0,
        shared_bytes=16,
        widest_load_bytes=16,
        widest_store_bytes=16,
        instructions_per_element=60.0,
        occupancy=0.75,
        floors={},
    )
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


@functools.cache
def measure(kernel: str) -> Row:
    return kernels.measure(kernel, FAST_TARGET)


@pytest.fixture
def triton() -> None:
    pytest.importorskip("triton", reason="Triton is not installed: it is for Linux only")


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("kernel", FAST_KERNELS)
def test_the_main_kernels_keep_their_budgets_on_one_target(kernel: str) -> None:
    """What is compiled now takes no more registers, spills and instructions, and no narrower accesses than recorded."""
    measured = measure(kernel)
    assert exceeded([measured], read_budgets()) == []
    assert (measured.spill_bytes, measured.local_accesses) == (0, 0)
    if kernel in WHOLLY_WIDE:
        assert measured.widest_load_bytes == measured.widest_store_bytes == 16


@pytest.mark.usefixtures("triton")
def test_a_step_is_limited_by_memory_not_by_instructions() -> None:
    """The step people run most stays within the instructions that an H100 issues while it waits for memory."""
    measured = measure("adamw8/one/bf16-bf16")
    assert measured.instructions_per_element is not None
    assert measured.instructions_per_element <= INSTRUCTIONS_OF_A_STEP
    assert measured.floors["H100"].limit == "memory"


TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")


@pytest.mark.slow
@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_keeps_its_budget(target: str) -> None:
    """All kernels on each of seven targets; and no budget is left of a kernel that is gone."""
    from bench.kernel_code import KERNELS

    rows = [kernels.measure(variant.name, target) for variant in KERNELS]
    assert exceeded(rows, read_budgets()) == []
    assert {measured.key for measured in rows} == {key for key in read_budgets() if key.endswith(f" {target}")}


@pytest.mark.usefixtures("triton")
def test_every_kernel_on_every_target_has_a_budget() -> None:
    """A new kernel without a recorded budget is noticed without compiling it."""
    from bench import kernel_code

    assert [kernels.target_name(target) for target in kernel_code.TARGETS] == list(TARGETS)
    wanted = {f"{variant.name} {target}" for variant in kernel_code.KERNELS for target in TARGETS}
    assert wanted == set(read_budgets())


@pytest.mark.parametrize("name", ["registers", "shared_bytes", "instructions_per_element"])
def test_a_budget_lowered_by_one_is_exceeded(name: str) -> None:
    """One less than the present is named with kernel, target and number; the recorded present is not."""
    budgets = {"adamw8 sm_90": budget_of(row())}
    assert exceeded([row()], budgets) == []
    budgets["adamw8 sm_90"][name] = getattr(row(), name) - 1
    (complaint,) = exceeded([row()], budgets)
    assert complaint.startswith(f"adamw8 sm_90: {name} is {getattr(row(), name)}, above its ")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"spill_bytes": 1}, "spill_bytes is 1, above its 0"),
        ({"local_accesses": 2}, "local_accesses is 2, above its 0"),
        ({"registers": 41}, "registers is 41, above its 40"),
        ({"widest_load_bytes": 8}, "widest_load_bytes is 8, below its 16"),
        ({"widest_store_bytes": 4}, "widest_store_bytes is 4, below its 16"),
        ({"instructions_per_element": 62.0}, "instructions_per_element is 62.0, above its 61.2"),
        ({"instructions_per_element": None}, "instructions_per_element is None, above its 61.2"),
        ({"kernel": "new"}, "has no budget"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_a_worse_kernel_is_named(changes: dict[str, object], complaint: str) -> None:
    """Each number that got worse, or cannot be told any more, gives one sentence."""
    (sentence,) = exceeded([row(**changes)], {"adamw8 sm_90": budget_of(row())})
    assert complaint in sentence


def test_a_better_kernel_is_within_its_budget() -> None:
    """Fewer registers and instructions and wider accesses break nothing."""
    better = row(registers=30, instructions_per_element=50.0, widest_load_bytes=32)
    assert exceeded([better], {"adamw8 sm_90": budget_of(row())}) == []


@pytest.mark.parametrize(
    ("bytes_per_element", "instructions", "floor"),
    [
        (10.0, 0.0, Floor(11.36, 13.70, "memory")),
        (10.0, None, Floor(11.36, 13.70, "memory")),
        (1.0, 128.0, Floor(10.0, 12.5, "issue")),
        (10.0, 140.0, Floor(11.36, 13.70, "memory")),
        (10.0, 154.0, Floor(12.03, 15.04, "issue")),
    ],
    ids=["bytes", "loop", "instructions", "bytes win", "instructions win"],
)
def test_a_floor_is_the_larger_of_bytes_and_instructions(
    bytes_per_element: float, instructions: float | None, floor: Floor
) -> None:
    """A GPU of 1,000 GB/s and 12,800 issue slots a nanosecond, both at their best and worst shares."""
    gpu = Gpu("round numbers", "sm_90", 1000, 100, 1.0)
    assert time_floor(gpu, bytes_per_element, instructions) == floor


@pytest.mark.parametrize(("name", "instructions"), [("A100", 96), ("RTX 3090", 191), ("RTX 4090", 412)])
def test_the_data_sheets_give_the_known_balance(name: str, instructions: float) -> None:
    """At full rates both, this many instructions take as long as the 10.06 bytes of an 8-bit step."""
    gpu = next(gpu for gpu in GPUS if gpu.name == name)
    slots_per_ns = gpu.multiprocessors * kernels.SCHEDULERS * kernels.LANES * gpu.clock_ghz
    assert 10.06 / gpu.bandwidth_gb_s * slots_per_ns == pytest.approx(instructions, rel=0.01)


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in place of the recorded results."""
    monkeypatch.setattr(kernels, "RESULTS", tmp_path)
    monkeypatch.setattr(kernels, "BUDGETS", tmp_path / "kernel_budgets.json")
    monkeypatch.setattr("bench.rows.RESULTS", tmp_path)
    return tmp_path


def test_the_file_states_the_present(results: Path) -> None:
    """A row replaces the earlier one of its kernel and target; others stay, unless all kernels were compiled."""
    kernels.record([row(), row(target="sm_80")], complete=True)
    kernels.record([row(registers=50)], complete=False)
    lines = [json.loads(line) for line in (results / "kernels.jsonl").read_text().splitlines()]
    assert [(line["target"], line["registers"]) for line in lines] == [("sm_80", 40), ("sm_90", 50)]
    kernels.record([row()], complete=True)
    assert len((results / "kernels.jsonl").read_text().splitlines()) == 1


def test_a_row_that_says_the_same_stays_as_it_was(results: Path) -> None:
    """Its commit and date are those at which the numbers came about."""
    kernels.record([row()], complete=True)
    file = results / "kernels.jsonl"
    before = json.loads(file.read_text())
    file.write_text(json.dumps({**before, "commit": "earlier"}) + "\n")
    kernels.record([row()], complete=True)
    assert json.loads(file.read_text())["commit"] == "earlier"
    kernels.record([row(registers=39)], complete=True)
    assert json.loads(file.read_text())["commit"] == before["commit"]


def test_budgets_are_recorded_and_read_back(results: Path) -> None:
    """A part of the kernels leaves the other budgets alone; all of them replace the file."""
    kernels.write_budgets([row(), row(target="sm_80")], complete=True)
    kernels.write_budgets([row(registers=50)], complete=False)
    budgets = read_budgets()
    assert {key: budget["registers"] for key, budget in budgets.items()} == {"adamw8 sm_80": 40, "adamw8 sm_90": 50}
    kernels.write_budgets([row()], complete=True)
    assert list(read_budgets()) == ["adamw8 sm_90"]


@pytest.mark.parametrize(("registers", "status"), [(40, 0), (39, 1)], ids=["kept", "lowered by one"])
def test_the_check_exits_with_1_and_names_the_kernel(
    registers: int, status: int, results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command compares what it compiled with the recorded budgets."""
    budgets = {"adamw8 sm_90": {**budget_of(row()), "registers": registers}}
    (results / "kernel_budgets.json").write_text(json.dumps(budgets))
    monkeypatch.setattr(kernels, "_chosen", lambda kernel, targets: ([("adamw8", "sm_90")], True))
    monkeypatch.setattr(kernels, "measure_all", lambda pairs: [row()])
    assert kernels.main(["--check"]) == status
    assert ("registers is 40, above its 39" in capsys.readouterr().out) == bool(status)


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize(
    ("arguments", "message"), [(["--target", "sm_10"], "no target sm_10"), (["--kernel", "nothing"], "no kernel has")]
)
def test_unknown_choices_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A target or kernel that does not exist is a usage error of one sentence."""
    assert kernels.main(arguments) == 2
    assert message in capsys.readouterr().out
