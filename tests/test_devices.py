"""Which device a run takes, and the one sentence for each that it cannot have: all from facts that are given."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lisa_kernels.devices import Card, Machine, Version, choose_device, driver_version, survey_machine, unused_gpu
from lisa_kernels.errors import InputError

AMPERE = Card("RTX 3090", Version(8, 6), 25_300_000_000)
VOLTA = Card("Tesla V100", Version(7, 0), 17_000_000_000)
HERE = Machine(
    "2.14.1+cu130", Version(13, 0), None, ("sm_75", "sm_80", "sm_90", "compute_90"), (AMPERE, AMPERE), "580.65.06",
    Version(13, 0),
)  # fmt: skip
NO_CUDA = Machine("2.14.1+cpu")
EMPTY = replace(HERE, cards=())


@pytest.mark.parametrize(
    ("asked", "machine", "found"),
    [
        ("auto", HERE, "cuda:0"), ("cuda", HERE, "cuda:0"), ("cuda:1", HERE, "cuda:1"), ("cpu", HERE, "cpu"),
        ("auto", NO_CUDA, "cpu"), ("auto", EMPTY, "cpu"), ("cpu", EMPTY, "cpu"),
        ("cuda", replace(HERE, cuda=None, rocm="7.0", architectures=("gfx1100",)), "cuda:0"),
        ("cuda", replace(HERE, cards=(Card("B300", Version(10, 3), 1),)), "cuda:0"),
    ],
)  # fmt: skip
def test_a_run_takes_one_device(asked: str, machine: Machine, found: str) -> None:
    """With its number, and the first one where none is named; later cards run the build's portable code."""
    assert str(choose_device(asked, machine)) == found


REFUSED = {
    "no such name": ("gpu", HERE, r"unknown --device 'gpu'.*cuda"),
    "no such number": ("cuda:7", HERE, "cuda:7: there is no such GPU; give one of cuda:0 RTX 3090, cuda:1"),
    "not in sight": (
        "cuda:1", replace(HERE, cards=(AMPERE,), visible="1"), "no such GPU with CUDA_VISIBLE_DEVICES=1; give",
    ),
    "none in sight": ("cuda", replace(EMPTY, visible=""), "CUDA_VISIBLE_DEVICES is '', which hides every"),
    "hidden by -1": ("cuda:0", replace(EMPTY, visible="-1"), "CUDA_VISIBLE_DEVICES is '-1', which hides every GPU"),
    "a number in sight that is none": (
        "cuda", replace(EMPTY, visible="9", complaint="No CUDA GPUs are available"),
        "torch sees no GPU with CUDA_VISIBLE_DEVICES=9 and says 'No CUDA GPUs are available'",
    ),
    "a driver too old": (
        "cuda", replace(EMPTY, driver="470.57.02", runs_cuda=Version(11, 4)),
        r"driver 470\.57\.02 runs CUDA up to 11\.4, and torch 2\.14\.1\+cu130 is built for 13\.0; update the driver",
    ),
    "no driver": ("cuda", replace(EMPTY, driver=None, runs_cuda=None), "built for CUDA, and no NVIDIA driver is here"),
    "torch without CUDA": ("cuda", NO_CUDA, r"torch 2\.14\.1\+cpu is built for CPUs, and no"),
    "torch without CUDA beside a card": (
        "cuda", replace(NO_CUDA, driver="580.65.06"), "an NVIDIA card is here, but torch .* is built without",
    ),
    "a card that the build has no code for": (
        "auto", replace(HERE, cards=(VOLTA,)), r"no code for Tesla V100, whose compute capability is 7\.0 \(it",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_had_is_one_sentence(case: str) -> None:
    """What was asked for, why it is not there, and what to do; the CPU is offered where no GPU will do."""
    asked, machine, message = REFUSED[case]
    with pytest.raises(InputError, match=message) as caught:
        choose_device(asked, machine)
    assert "\n" not in str(caught.value)
    assert "cpu" in str(caught.value)


@pytest.mark.parametrize(
    ("machine", "said"),
    [
        (HERE, None), (NO_CUDA, None), (replace(EMPTY, visible=""), None),
        (replace(NO_CUDA, driver="580.65.06"), "the GPU is not used: an NVIDIA card is here, but torch"),
        (replace(EMPTY, runs_cuda=Version(12, 2)), "the GPU is not used: the NVIDIA driver 580.65.06 runs"),
    ],
)  # fmt: skip
def test_a_gpu_that_is_left_alone_is_spoken_of(machine: Machine, said: str | None) -> None:
    """Where auto takes the CPU beside a card; not where there is none, or its user hid it."""
    found = unused_gpu(machine)
    assert (found is None) == (said is None)
    assert found is None or found.startswith(str(said))


@pytest.mark.parametrize(
    ("words", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024\n", "535.183.01"),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65  Release Build\nGCC version: 12.3\n",
            "580.65",
        ),
        ("something else", None),
    ],
)
def test_the_drivers_version_is_read(words: str, version: str | None, tmp_path: Path) -> None:
    file = tmp_path / "version"
    assert driver_version(file) is None
    file.write_text(words)
    assert driver_version(file) == version


class Properties:
    name, major, minor, total_memory = "card", 9, 0, 10**9


@pytest.mark.parametrize("outcome", ["cards", "warning", "error"])
def test_what_torch_warns_of_or_raises_becomes_a_fact(outcome: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver too old is a warning of torch's, a card in a bad state an error; neither goes further."""
    text = (
        "CUDA initialization: The driver is too old (found version 11040). Please\nupdate. (Triggered internally at x.)"
    )

    def is_available() -> bool:
        if outcome == "warning":
            import warnings

            warnings.warn(text, stacklevel=1)
        return outcome != "warning"

    def properties(index: int) -> type[Properties]:
        if outcome == "error":
            raise RuntimeError("CUDA error: out of memory\nCompile with …")
        return Properties

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    found = survey_machine()
    assert found.cards == ((Card("card", Version(9, 0), 10**9),) if outcome == "cards" else ())
    complaints = {
        "cards": "",
        "warning": "The driver is too old (found version 11040)",
        "error": "CUDA error: out of memory",
    }
    assert found.complaint.startswith(complaints[outcome])
    assert found.torch == torch.__version__
