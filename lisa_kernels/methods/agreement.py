"""What the ranks that train one model have to hold alike before they begin, asked of all of them."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch
from torch import nn

from lisa_kernels.distributed import Ranks, is_sharded
from lisa_kernels.errors import InputError
from lisa_kernels.methods.definitions import Method
from lisa_kernels.optim.settings import as_number


def agree(ranks: Ranks, model: nn.Module, method: Method, settings: Mapping[str, Any]) -> None:
    """Raise InputError on all ranks unless package, method, settings, parameters and their values are the same.

    Notes whether the devices are of several kinds. Waits for the device, and reads every weight once.
    """
    params = dict(model.named_parameters())
    with ranks.together():
        for device in {param.device for param in params.values()}:
            ranks.check_carries(device)
    facts: dict[str, Any] = {
        "the version of lisa_kernels": importlib.metadata.version("lisa_kernels"),
        "the version of torch": torch.__version__,
        "the method": method.settings(),
        **{name: _plain(value) for name, value in settings.items()},
    }
    for name, param in params.items():
        frozen = "" if param.requires_grad else ", frozen"
        facts[name] = f"{list(param.shape)} {param.dtype} on {param.device.type}{frozen}"
    ranks.check_alike(facts)
    kinds = ranks.tell(sorted({kind_of(param.device) for param in params.values()}))
    ranks.mixed = any(each != kinds[0] for each in kinds)
    _check_folders(ranks, settings["paging"])
    # Of what is shared out each rank has other rows.
    whole = {name: param for name, param in params.items() if not is_sharded(param)}
    ranks.check_equal(whole, "before training")


def kind_of(device: torch.device) -> str:
    """Return a name of what a device is, the same where it multiplies in the same way."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {torch.cuda.get_device_capability(device)}"
    return f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}" if device.type == "cpu" else device.type


def _plain(value: Any) -> Any:
    """Return a setting as it travels: a rate may be a tensor."""
    if isinstance(value, (tuple, list)):
        return [as_number(each) for each in value]
    return value if value is None or isinstance(value, str) else as_number(value)


def _check_folders(ranks: Ranks, paging: str | None) -> None:
    """Raise InputError where several ranks would keep their pages in one folder, of one machine or a shared disk."""
    if paging is None or not paging.startswith("file:"):
        return
    folder = Path(paging.removeprefix("file:")).expanduser()
    with ExitStack() as marks:
        with ranks.together():
            folder.mkdir(parents=True, exist_ok=True)
            mark = Path(marks.enter_context(NamedTemporaryFile(prefix=".rank-", dir=folder)).name).name
        others = [name for rank, name in enumerate(ranks.tell(mark)) if rank != ranks.rank]
        # Told while all marks are there.
        shared = ranks.any_has([any((folder / name).exists() for name in others)])[0]
    if shared:
        raise InputError(
            f'paging is "{paging}", one folder for several ranks, and a folder holds the pages of one; use paging='
            '"host", or on each machine a folder of a disk of its own, for one rank there.'
        )
