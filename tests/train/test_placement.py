"""Where a run goes: its device is said, its dtype is that of its start, and memory that is not free refuses it."""

from __future__ import annotations

import dataclasses
import importlib
import io
from pathlib import Path

import pytest
import torch
from rich.console import Console
from train.small_run import arguments, write_text

from lisa_kernels.cli import main
from lisa_kernels.devices import Card, Machine, Version
from lisa_kernels.distributed import Launch
from lisa_kernels.errors import InputError
from lisa_kernels.ops import capability
from lisa_kernels.train import placement
from lisa_kernels.train.memory import PlannedMemory
from lisa_kernels.train.options import FineTuneOptions
from lisa_kernels.train.placement import Memory, check_room, device_of_rank, out_of_memory, settled_dtype, take_device

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
CARD = Card("RTX 3090", Version(8, 6), 25_300_000_000)
TWO = Machine("2.14.1+cu130", Version(13, 0), cards=(CARD, CARD), runs_cuda=Version(13, 0))


def options(**given: str) -> FineTuneOptions:
    return FineTuneOptions("preset:tiny", "stdlib", Path("run"), **given)


TWO_HERE = Launch(rank=3, count=4, local_rank=1, local_count=2)


@pytest.mark.parametrize("asked", ["auto", "cuda"])
def test_each_of_several_processes_takes_a_gpu_of_its_own(asked: str) -> None:
    assert device_of_rank(asked, TWO_HERE, TWO) == "cuda:1"
    assert device_of_rank(asked, None, TWO) == asked
    assert device_of_rank("cpu", TWO_HERE, TWO) == "cpu"


def test_processes_that_would_share_a_gpu_are_refused() -> None:
    """More of them than cards, or one card for all."""
    with pytest.raises(InputError, match="2 processes were started on a machine with 1 GPUs"):
        device_of_rank("auto", TWO_HERE, dataclasses.replace(TWO, cards=(CARD,)))
    with pytest.raises(InputError, match="--device cuda:0 is one device, and 2 processes"):
        device_of_rank("cuda:0", TWO_HERE, TWO)


@pytest.mark.parametrize(
    ("asked", "machine", "said"),
    [
        ("auto", TWO, "device cuda:0, RTX 3090 (compute capability 8.6, 25.3 GB); 1 other GPU is not used\n"),
        ("cuda:1", TWO, "device cuda:1, RTX 3090 (compute capability 8.6, 25.3 GB); 1 other GPU is not used\n"),
        ("cpu", TWO, "device cpu\n"),
        ("auto", Machine("2.13.0+cpu"), "device cpu\n"),
    ],
)
def test_the_run_says_which_device_it_takes(asked: str, machine: Machine, said: str) -> None:
    file = io.StringIO()
    take_device(options(device=asked), Console(file=file, width=200), machine)
    assert file.getvalue() == said


def test_a_card_that_torch_cannot_use_is_noted() -> None:
    """With the reason, and the run goes on on the CPU as auto allows."""
    file = io.StringIO()
    machine = Machine("2.13.0+cpu", driver="535.183.01")
    assert take_device(options(), Console(file=file, width=300), machine) == CPU
    assert file.getvalue().startswith("note: the GPU is not used: an NVIDIA card is here, but torch 2.13.0+cpu")


def test_a_resumed_run_keeps_the_dtype_that_it_began_with() -> None:
    """What auto means where it goes on would change its weights without a word; what is given is taken."""
    assert settled_dtype(options(), {}, CPU) == "fp32"
    assert settled_dtype(options(), {"dtype": "bf16"}, CPU) == "bf16"
    assert settled_dtype(options(dtype="fp16"), {"dtype": "bf16"}, CPU) == "fp16"


def test_a_plan_above_what_is_free_is_refused() -> None:
    """The message says what is free and who has the rest, not what the card has alone."""
    memory = Memory(total=25_300_000_000, free=9_800_000_000, held=0)
    check_room(9_800_000_000, memory, GPU)
    with pytest.raises(InputError) as caught:
        check_room(14_310_000_000, memory, GPU)
    assert str(caught.value).startswith(
        "the run takes 14.31 GB by plan, more than is free of cuda:0's 25.30 GB (9.80 free, 15.50 by other programs"
    )
    assert "--fit 9.8GB" in str(caught.value)


def test_memory_that_ends_in_a_run_is_one_sentence() -> None:
    memory = Memory(total=25_300_000_000, free=300_000_000, held=12_000_000_000)
    with pytest.raises(
        InputError, match=r"no more memory on cuda:0: of its 25\.30 GB \(0\.30 free, 12\.00 held by this"
    ):
        raise out_of_memory(memory, GPU, resumable=False)
    assert "--resume" in str(out_of_memory(memory, GPU, resumable=True))
    assert "expandable_segments" not in str(out_of_memory(memory, GPU, resumable=True))
    assert "--resume" not in str(out_of_memory(memory, GPU, resumable=False))


def test_memory_that_is_free_in_pieces_says_how_they_are_joined() -> None:
    """Only where the pieces are more than what is always left between tensors."""
    scattered = Memory(total=24_000_000_000, free=5_000_000_000, held=19_000_000_000, scattered=4_000_000_000)
    said = str(out_of_memory(scattered, GPU, resumable=True))
    assert "4.00 GB are free between tensors" in said
    assert "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True" in said
    assert said.endswith("--resume.")
    whole = dataclasses.replace(scattered, scattered=1_000_000_000)
    assert "expandable_segments" not in str(out_of_memory(whole, GPU, resumable=True))


@pytest.mark.parametrize("device", ["cuda:7", "cuda", "tpu"])
def test_a_device_that_is_not_there_ends_the_command_with_2(
    device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Before anything is read or written."""
    monkeypatch.setattr(placement, "survey_machine", lambda: TWO if device == "cuda:7" else Machine("2.13.0+cpu"))
    assert main(arguments(write_text(tmp_path), tmp_path / "run", "--device", device)) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("lisa-kernels finetune: ")
    assert "--device" in said[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("moment", ["before", "within"])
def test_a_card_that_is_full_ends_the_command_with_2(
    moment: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Whether the plan tells it, or the allocator."""
    finetune = "lisa_kernels.train.finetune"
    full = Memory(total=8_000_000_000, free=1_000, held=0)
    monkeypatch.setattr(Memory, "of", lambda device: full)
    # The package's function of the same name hides the module.
    planning = importlib.import_module("lisa_kernels.plan.command")
    monkeypatch.setattr(planning, "plan_run", lambda options, **more: PlannedMemory(2_000_000_000))
    if moment == "before":
        monkeypatch.setattr(f"{finetune}.take_device", lambda options, console, **more: GPU)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        monkeypatch.setattr(capability, "capability", lambda device: (8, 6))
    else:

        def load(*_: object) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory.")

        monkeypatch.setattr("lisa_kernels.train.preparation.load_model_for", load)
    assert main(arguments(write_text(tmp_path), tmp_path / "run")) == 2
    said = capsys.readouterr().err
    assert {"before": "the run takes", "within": "no more memory on"}[moment] in said
    assert "Traceback" not in said


def test_transformers_sees_one_gpu_where_there_are_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would wrap the model in DataParallel, and take twice the batch."""
    from transformers import TrainingArguments

    from lisa_kernels.train.trainer import OneDevice

    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
    theirs = TrainingArguments(str(tmp_path), use_cpu=True, per_device_train_batch_size=3)
    ours = OneDevice(str(tmp_path), use_cpu=True, per_device_train_batch_size=3)
    assert (theirs.n_gpu, theirs.train_batch_size, theirs.parallel_mode.value) == (2, 6, "not_distributed")
    assert (ours.n_gpu, ours.train_batch_size, ours.parallel_mode.value) == (1, 3, "not_parallel")
    assert ours.device == CPU


def test_a_dtype_that_the_device_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """auto takes another; what was asked for, and what a resumed run began with, is not changed without a word."""
    monkeypatch.setattr(capability, "capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert [settled_dtype(options(dtype=name), {}, GPU) for name in ("auto", "fp16", "fp32")] == [
        "fp16",
        "fp16",
        "fp32",
    ]
    for given, began in ((options(dtype="bf16"), {}), (options(), {"dtype": "bf16"})):
        with pytest.raises(InputError, match=r"Tesla T4 has compute capability 7\.5.*use fp16"):
            settled_dtype(given, began, GPU)
