"""The GPUs of this machine as torch sees them, which device a run takes, and in one sentence why it cannot have one."""

from __future__ import annotations

import ctypes
import os
import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from lisa_kernels.errors import InputError, unknown_name

_DRIVER_VERSION = Path("/proc/driver/nvidia/version")
_DRIVER_LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_INSTALL = "https://pytorch.org/get-started/locally"


class Version(NamedTuple):
    """A version of CUDA, or a compute capability."""

    major: int
    minor: int

    def __str__(self) -> str:
        """Return it as people write it."""
        return f"{self.major}.{self.minor}"


class Card(NamedTuple):
    """A GPU; `total_bytes` is all its memory."""

    name: str
    capability: Version
    total_bytes: int


@dataclass(frozen=True)
class Machine:
    """What there is to know of the GPUs here before one is used.

    torch: its version. cuda, rocm: what its build is for. architectures: the cards whose code is in that build, as
    `torch.cuda.get_arch_list` names them. driver: the version of NVIDIA's driver, and runs_cuda the newest CUDA that it
    runs. visible: CUDA_VISIBLE_DEVICES, None where it is not set. complaint: what torch said, where it sees no GPU.
    """

    torch: str
    cuda: Version | None = None
    rocm: str | None = None
    architectures: tuple[str, ...] = ()
    cards: tuple[Card, ...] = ()
    driver: str | None = None
    runs_cuda: Version | None = None
    visible: str | None = None
    complaint: str = ""

    @property
    def hides_all(self) -> bool:
        """Whether the environment lets programs see no GPU."""
        return self.visible is not None and self.visible.split(",")[0].strip() in ("", "-1")

    @property
    def has_nvidia(self) -> bool:
        """Whether an NVIDIA driver is here, whatever torch makes of it."""
        return self.driver is not None or self.runs_cuda is not None


def survey_machine() -> Machine:
    """Return what torch, the driver and the environment say of the GPUs here; nothing is allocated on any."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            cards = _cards() if torch.cuda.is_available() else ()
            complaint = str(said[-1].message) if said and not cards else ""
        except RuntimeError as error:
            cards, complaint = (), str(error)
    return Machine(
        torch=torch.__version__,
        cuda=None if torch.version.cuda is None else _version(torch.version.cuda),
        rocm=torch.version.hip,
        architectures=tuple(torch.cuda.get_arch_list()) if cards else (),
        cards=cards,
        driver=driver_version(),
        runs_cuda=_driver_cuda(),
        visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
        complaint=_first_sentence(complaint),
    )


def _cards() -> tuple[Card, ...]:
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return tuple(Card(card.name, Version(card.major, card.minor), card.total_memory) for card in found)


def driver_version(file: Path = _DRIVER_VERSION) -> str | None:
    """Return the version of NVIDIA's driver that Linux has loaded; None where there is none, or it does not say."""
    try:
        found = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", file.read_text())
    except OSError:
        return None
    return found[0] if found else None


def _driver_cuda() -> Version | None:
    try:
        library = ctypes.CDLL(_DRIVER_LIBRARY)
    except OSError:
        return None
    number = ctypes.c_int()
    failed = library.cuDriverGetVersion(ctypes.byref(number))
    return None if failed or not number.value else Version(number.value // 1000, number.value % 1000 // 10)


def _version(text: str) -> Version:
    major, minor = re.findall(r"\d+", text)[:2]
    return Version(int(major), int(minor))


def _first_sentence(text: str) -> str:
    line = " ".join(text.split("(Triggered internally")[0].split())
    return re.split(r"\.(?= )", line)[0].removeprefix("CUDA initialization: ").rstrip(".")


def choose_device(asked: str, machine: Machine) -> torch.device:
    """Return the one device that `asked` names: cpu, cuda, cuda:N, or auto, the first GPU where there is one.

    Raises InputError for a GPU that is not there, or that this build of torch has no code for.
    """
    match = re.fullmatch(r"cuda(?::(\d+))?", asked)
    if match is None and asked not in ("auto", "cpu"):
        raise unknown_name("--device", asked, ["auto", "cpu", "cuda", "cuda:0"])
    if asked == "cpu" or (asked == "auto" and not machine.cards):
        return torch.device("cpu")
    index = int(match[1] or 0) if match else 0
    if not machine.cards:
        raise InputError(f"--device {asked}: {why_no_gpu(machine)}; or give --device cpu.")
    if index >= len(machine.cards):
        listed = ", ".join(f"cuda:{number} {card.name}" for number, card in enumerate(machine.cards))
        limited = "" if machine.visible is None else f" with CUDA_VISIBLE_DEVICES={machine.visible}"
        raise InputError(f"--device {asked}: there is no such GPU{limited}; give one of {listed}, or cpu.")
    _check_code(machine, machine.cards[index])
    return torch.device("cuda", index)


def why_no_gpu(machine: Machine) -> str:
    """Return why torch sees no GPU here, and what to do about it."""
    if machine.cuda is None and machine.rocm is None:
        if not machine.has_nvidia:
            return f"torch {machine.torch} is built for CPUs, and no NVIDIA driver is here"
        return f"an NVIDIA card is here, but torch {machine.torch} is built without CUDA; install another ({_INSTALL})"
    if machine.hides_all:
        return (
            f"CUDA_VISIBLE_DEVICES is {machine.visible!r}, which hides every GPU; unset it, or name a GPU by its number"
        )
    if machine.cuda is not None and machine.runs_cuda is not None and machine.runs_cuda.major < machine.cuda.major:
        return (
            f"the NVIDIA driver {machine.driver or 'here'} runs CUDA up to {machine.runs_cuda}, and torch "
            f"{machine.torch} is built for {machine.cuda}; update the driver, or install a torch for CUDA "
            f"{machine.runs_cuda.major} ({_INSTALL})"
        )
    if machine.cuda is not None and not machine.has_nvidia:
        return f"torch {machine.torch} is built for CUDA, and no NVIDIA driver is here; install one"
    limited = "" if machine.visible is None else f" with CUDA_VISIBLE_DEVICES={machine.visible}"
    return f"torch sees no GPU{limited}" + (f" and says {machine.complaint!r}" if machine.complaint else "")


def unused_gpu(machine: Machine) -> str | None:
    """Return what to say where the CPU is taken though an NVIDIA driver is here; None where nobody need wonder."""
    if machine.cards or machine.hides_all or not machine.has_nvidia:
        return None
    return f"the GPU is not used: {why_no_gpu(machine)}"


def _check_code(machine: Machine, card: Card) -> None:
    """Raise InputError where torch's build holds no code that the card runs; ROCm's names are left to torch."""
    built = [
        match for match in (re.fullmatch(r"(sm|compute)_(\d+)(\d)", name) for name in machine.architectures) if match
    ]
    runs = [
        # Machine code runs on cards of its own generation, the portable one on all later ones.
        (major == card.capability.major and minor <= card.capability.minor)
        if kind == "sm"
        else (major, minor) <= card.capability
        for kind, major, minor in ((match[1], int(match[2]), int(match[3])) for match in built)
    ]
    if built and not any(runs):
        raise InputError(
            f"torch {machine.torch} has no code for {card.name}, whose compute capability is {card.capability} (it has "
            f"{', '.join(match[0] for match in built)}); install another build ({_INSTALL}), or give --device cpu."
        )
