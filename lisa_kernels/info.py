"""What `lisa-kernels info` says: versions, cards, and which kernel each operation uses here and whether it runs."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from lisa_kernels.devices import Machine, survey_machine, unused_gpu, why_no_gpu
from lisa_kernels.errors import InputError
from lisa_kernels.ops.capability import auto_dtype, check_capability
from lisa_kernels.ops.dispatch import kernels_in_use
from lisa_kernels.ops.library import triton_present
from lisa_kernels.trial import Trial, try_kernels

PACKAGES = ("lisa_kernels", "torch", "triton", "transformers", "accelerate", "datasets", "peft", "safetensors")
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def locked_memory_limit() -> int | None:
    """Return how many bytes of memory the process may lock (`ulimit -l`); None for no limit, or none that is told."""
    try:
        import resource  # not there on Windows
    except ImportError:
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


def describe() -> dict[str, Any]:
    """Return versions, cards and kernels as plain values; on each card every kernel is compiled and run once."""
    machine = survey_machine()
    return {
        "python": platform.python_version(),
        "packages": {package: _version(package) for package in PACKAGES},
        "cpu_threads": torch.get_num_threads(),
        **describe_gpus(machine, [_of_card(index) for index in range(len(machine.cards))]),
        "locked_memory_limit_bytes": locked_memory_limit(),
        "kernels": [choice._asdict() for choice in kernels_in_use()],
    }


def describe_gpus(machine: Machine, found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the facts of a machine's GPUs as plain values; found: what was found out on each."""
    cards = [
        {"name": card.name, "capability": str(card.capability), "total_bytes": card.total_bytes, **more}
        for card, more in zip(machine.cards, found, strict=True)
    ]
    return {
        "gpus": cards,
        "why_no_gpu": None if cards else unused_gpu(machine) or why_no_gpu(machine),
        "cuda": None if machine.cuda is None else str(machine.cuda),
        "rocm": machine.rocm,
        "driver": machine.driver,
        "driver_cuda": None if machine.runs_cuda is None else str(machine.runs_cuda),
        "visible_devices": machine.visible,
    }


def _of_card(index: int) -> dict[str, Any]:
    device = torch.device("cuda", index)
    free, _ = torch.cuda.mem_get_info(device)
    try:
        check_capability(device)
    except InputError as error:
        return {"free_bytes": free, "auto_dtype": None, "kernels": str(error)}
    return {
        "free_bytes": free,
        "auto_dtype": NAMES[auto_dtype(device)],
        "kernels": verdict(try_kernels(device), triton_present()),
    }


def verdict(trials: Sequence[Trial], triton: bool) -> str:
    """Return in a few words what came of the operations on a card, which are kernels where Triton is."""
    wrong = [f"{trial.op}: {trial.problem}" for trial in trials if trial.problem]
    seconds = sum(trial.seconds for trial in trials)
    done = (
        f"all {len(trials)} compile and give" if triton else f"none without Triton; all {len(trials)} operations give"
    )
    return "; ".join(wrong) or f"{done} the CPU's results ({seconds:.1f} s)"


def print_info(info: dict[str, Any], console: Console) -> None:
    """Print what `describe` returned."""
    console.print(f"Python {info['python']}, {info['cpu_threads']} CPU threads", highlight=False)
    packages = (f"{name} {version or 'not installed'}" for name, version in info["packages"].items())
    console.print(", ".join(packages), highlight=False)
    for line in gpu_lines(info):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    table = Table("operation", "device", "kernel", "why not another")
    for choice in info["kernels"]:
        table.add_row(choice["op"], choice["device"], choice["kernel"], choice["why_not_others"])
    console.print(table)


def gpu_lines(info: dict[str, Any]) -> list[str]:
    """Return what there is to say of the GPUs, and of what limits them."""
    driver = f"driver {info['driver'] or 'unknown'}" + (f" (CUDA {info['driver_cuda']})" if info["driver_cuda"] else "")
    build = f"CUDA {info['cuda']}" if info["cuda"] else f"ROCm {info['rocm']}" if info["rocm"] else "CPUs"
    lines = [
        f"torch is built for {build}; " + (driver if info["driver"] or info["driver_cuda"] else "no NVIDIA driver")
    ]
    if info["why_no_gpu"]:
        lines.append(f"no GPU: {info['why_no_gpu']}")
    for index, card in enumerate(info["gpus"]):
        lines.append(
            f"cuda:{index}: {card['name']}, compute capability {card['capability']}, {card['free_bytes'] / 1e9:.1f} of "
            f"{card['total_bytes'] / 1e9:.1f} GB free; --dtype auto takes {card['auto_dtype'] or 'none'}; kernels: "
            f"{card['kernels']}"
        )
    if info["visible_devices"] is not None:
        lines.append(f"CUDA_VISIBLE_DEVICES={info['visible_devices']}")
    limit = info["locked_memory_limit_bytes"]
    lines.append("locked memory (ulimit -l): " + ("no limit" if limit is None else f"{limit / 1e6:,.1f} MB"))
    return lines
