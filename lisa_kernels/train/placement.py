"""Where a run goes: its one device, the dtype of its weights there, and whether the memory that it takes is free."""

from __future__ import annotations

import errno
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from rich.console import Console

from lisa_kernels.devices import Machine, choose_device, survey_machine, unused_gpu
from lisa_kernels.distributed import Launch
from lisa_kernels.errors import InputError
from lisa_kernels.ops.capability import check_dtype
from lisa_kernels.train.models import DTYPES, parse_dtype
from lisa_kernels.train.options import FineTuneOptions

# The share of a card that lies in pieces between tensors from which on these are why there is no more memory.
SCATTERED = 0.05
# What torch says where the host has no more.
NO_HOST_MEMORY = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory",
                  "Cannot allocate memory")  # fmt: skip


@dataclass(frozen=True)
class Memory:
    """Bytes of a GPU: all, those that this process may still take, and those that it holds.

    scattered: of the free ones, those in pieces that torch keeps between tensors.
    """

    total: int
    free: int
    held: int
    scattered: int = 0

    @classmethod
    def of(cls, device: torch.device) -> Memory:
        """Ask the driver; what torch keeps for later tensors counts as free."""
        free, total = torch.cuda.mem_get_info(device)
        held = torch.cuda.memory_allocated(device)
        scattered = torch.cuda.memory_reserved(device) - held
        return cls(total, free + scattered, held, scattered)

    def __str__(self) -> str:
        """Return who has it."""
        others = max(0, self.total - self.free - self.held)
        parts = [(self.free, "free"), (self.held, "held by this run"), (others, "by other programs and the driver")]
        shares = ", ".join(f"{size / 1e9:.2f} {what}" for size, what in parts if size or what == "free")
        return f"{self.total / 1e9:.2f} GB ({shares})"


class HasDevice(Protocol):
    """Options that name a device."""

    @property
    def device(self) -> str:
        """cpu, cuda, cuda:N or auto."""


def take_device(
    options: HasDevice, console: Console, machine: Machine | None = None, launch: Launch | None = None
) -> torch.device:  # fmt: skip
    """Return the device of the run, and say which it is. Raises InputError where it is not there.

    launch: this process's place among several, which take a GPU each.
    """
    machine = survey_machine() if machine is None else machine
    device = choose_device(device_of_rank(options.device, launch, machine), machine)
    unused = unused_gpu(machine) if options.device == "auto" else None
    if unused is not None:
        console.print(f"note: {unused}", highlight=False, markup=False, style="yellow")
    console.print(f"device {described(device, machine)}", highlight=False, markup=False)
    return device


def device_of_rank(asked: str, launch: Launch | None, machine: Machine) -> str:
    """Return what --device means to one of several processes: each on this machine takes a GPU of its own.

    Raises InputError where there are fewer GPUs than processes, or where one is named for all of them.
    """
    if launch is None or asked == "cpu" or launch.local_count == 1 or not machine.cards:
        return asked
    if asked not in ("auto", "cuda"):
        raise InputError(
            f"--device {asked} is one device, and {launch.local_count} processes were started on this machine; leave "
            "it out, so that each takes a GPU of its own, or give --device cpu."
        )
    if launch.local_count > len(machine.cards):
        raise InputError(
            f"{launch.local_count} processes were started on a machine with {len(machine.cards)} GPUs; start as many "
            "as there are, or give --device cpu."
        )
    return f"cuda:{launch.local_rank}"


def described(device: torch.device, machine: Machine) -> str:
    """Return the name of a device, its card, and how many others are left alone."""
    if device.type != "cuda":
        return str(device)
    card, others = machine.cards[device.index], len(machine.cards) - 1
    left = "" if not others else f"; {others} other {'GPUs are' if others > 1 else 'GPU is'} not used"
    return f"{device}, {card.name} (compute capability {card.capability}, {card.total_bytes / 1e9:.1f} GB){left}"


def settled_dtype(options: FineTuneOptions, facts: Mapping[str, Any], device: torch.device) -> str:
    """Return the name of the dtype of the run's weights: what auto means here, or meant where a resumed run began.

    Raises InputError where the device does not compute in it.
    """
    name = facts.get("dtype", "auto") if options.dtype == "auto" else options.dtype
    dtype = parse_dtype(name, device)
    check_dtype(dtype, device)
    return next(known for known, each in DTYPES.items() if each is dtype)


def check_room(planned_bytes: int, memory: Memory, device: torch.device) -> None:
    """Raise InputError where the tensors of a run are more than what is free on its GPU."""
    if planned_bytes > memory.free:
        raise InputError(
            f"the run takes {planned_bytes / 1e9:.2f} GB by plan, more than is free of {device}'s {memory}; end other "
            f"programs there, or have `lisa-kernels plan --fit {memory.free / 1e9:.1f}GB` find settings that fit."
        )


def out_of_memory(memory: Memory, device: torch.device, resumable: bool) -> InputError:
    """Return the error for a GPU whose memory has ended in a run."""
    again = "continue from the last checkpoint with --resume" if resumable else "start again"
    if memory.scattered > SCATTERED * memory.total:
        # torch has given back what it could before it said that there is no more.
        return InputError(
            f"no more memory on {device} in one piece: of its {memory}, {memory.scattered / 1e9:.2f} GB are free "
            "between tensors; set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True, which joins such pieces, and "
            f"{again}."
        )
    return InputError(
        f"no more memory on {device}: of its {memory}; end other programs there and {again}, or have `lisa-kernels "
        "plan --fit SIZE` find settings that take less."
    )


def out_of_host_memory(error: BaseException, resumable: bool, resting: str | None = None) -> InputError | None:
    """Return what to say of a host whose memory has ended in a run; None of any other error.

    resting: how weights rest.
    """
    reason = " ".join(str(error).split())
    ended = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    if not ended and not any(words in reason for words in NO_HOST_MEMORY):
        return None
    asked = re.search(r"allocate (\d+) bytes", reason)
    size = "" if asked is None else f" for {int(asked[1]):,} bytes"
    again = "continue from the last checkpoint with --resume" if resumable else "start again"
    masters = "" if resting in (None, "16-bit") else ", with --masters FOLDER, which keeps 16-bit weights in files"
    return InputError(f"the host has no more memory{size}; end other programs and {again}{masters}.")
