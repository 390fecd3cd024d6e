"""What `lisa-kernels info` says: versions, devices, and which kernel each operation uses here."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from lisa_kernels.ops.dispatch import kernels_in_use

PACKAGES = ("lisa_kernels", "torch", "triton", "transformers", "accelerate", "datasets", "peft", "safetensors")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def describe() -> dict[str, Any]:
    """Return versions, devices and kernels as plain values."""
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "packages": {package: _version(package) for package in PACKAGES},
        "cpu_threads": torch.get_num_threads(),
        "gpus": devices,
        "kernels": [choice._asdict() for choice in kernels_in_use()],
    }


def print_info(info: dict[str, Any], console: Console) -> None:
    """Print what `describe` returned."""
    console.print(
        f"Python {info['python']}, {info['cpu_threads']} CPU threads, GPUs: {', '.join(info['gpus']) or 'none'}"
    )
    console.print(
        ", ".join(f"{name} {version or 'not installed'}" for name, version in info["packages"].items()), highlight=False
    )
    table = Table("operation", "device", "kernel", "why not another")
    for choice in info["kernels"]:
        table.add_row(choice["op"], choice["device"], choice["kernel"], choice["why_not_others"])
    console.print(table)
