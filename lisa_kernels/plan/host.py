"""What weights at rest take beside the device: masters in host memory or in files, and what is written of these."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from lisa_kernels.layers import AccumulatingSlot, quantised_by
from lisa_kernels.methods.masters import IN_MEMORY, MasterBytes
from lisa_kernels.methods.resting import check_resting
from lisa_kernels.methods.survey import survey_model
from lisa_kernels.methods.units import DEFAULT_GAP
from lisa_kernels.sizes import gb
from lisa_kernels.train.configs import PRESET_PREFIX, stored_config
from lisa_kernels.train.empty_model import empty_model

FILES = "files"


@dataclass(frozen=True)
class HostBytes:
    """The masters of a run; moments and activations that wait in host memory are beside them.

    memory_bytes: of them in host memory, which nothing else may use. file_cache_bytes: in files that are mapped, which
    the system holds in memory as long as there is room. disk_bytes: the most that their folder holds. written_at_start,
    written_per_switch, written_in_run: bytes that go to the disk, checkpoints apart, as if all layers left at a switch;
    the last one with the first, None where the length of the run is not known.
    """

    memory_bytes: int
    file_cache_bytes: int = 0
    disk_bytes: int = 0
    written_at_start: int = 0
    written_per_switch: int = 0
    written_in_run: int | None = 0

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain values, for JSON."""
        return asdict(self)


class RehearsedMasters:
    """Stands for `Masters` in a rehearsal: nothing is in memory and nothing is written."""

    bytes_written = 0

    def keep(self, layer: AccumulatingSlot, path: str) -> None:
        """Have the layer's master take no memory."""
        layer.move_to(_NoFile(layer.stored_weight.detach()), layer.stored_weight.detach())

    def files(self) -> dict[str, Path]:
        """There is none."""
        return {}

    def close(self) -> None:
        """There is nothing to delete."""


class _NoFile:
    """The home of a master without values."""

    def __init__(self, master: Tensor) -> None:
        self._like = torch.empty((), dtype=master.dtype, device=master.device).expand(master.shape)

    def check(self) -> None:
        """Nobody changes what is not there."""

    def write(self, tiles: Iterable[Tensor]) -> Tensor:
        """Take the tiles one after the other, as a file does."""
        for _ in tiles:
            pass
        return self._like

    aside = write


def host_bytes(workload: Any, steps: int | None) -> HostBytes | None:
    """Return what the masters of a workload take; None of one whose weights do not rest. steps: of the run."""
    resting = check_resting(getattr(workload, "resting", None), workload.method, workload.ranks > 1)
    if resting is None:
        return None
    method = workload.method if workload.length is None else workload.length.applied_to(workload.method)
    masters = MasterBytes.of(survey_model(empty_model(workload.model, workload.dtype), workload.method))
    if workload.masters in (None, IN_MEMORY):
        return HostBytes(masters.all)
    period, gap = method.get("period", None), method.get("gap", DEFAULT_GAP)
    at_start = masters.all if _is_in_no_file(workload.model) else 0
    if method.form == "adapter":
        # They are merged once, at the end.
        return HostBytes(0, masters.all, masters.wanted, at_start, 0, at_start + 2 * masters.active)
    refreshes = 0 if not gap or period is None else (period - 1) // gap
    per_switch = 0 if period is None else masters.drawn * (1 + refreshes)
    in_run = None
    if steps is not None:
        switches = 0 if period is None else steps // period
        stays = masters.active if period is None else masters.active - masters.drawn
        settled = switches * per_switch + (steps // gap * stays if gap else 0)
        # At the end, saved with what the last layers have learnt, and settled for good.
        in_run = at_start + settled + 2 * masters.active
    return HostBytes(0, masters.all, masters.wanted, at_start, per_switch, in_run)


def _is_in_no_file(model: Any) -> bool:
    """Return whether a model's weights are in no file as they are: random ones, and what codes mean."""
    if not isinstance(model, str):
        return False
    return model.startswith(PRESET_PREFIX) or quantised_by(stored_config(model)) is not None


def print_host(host: HostBytes | None, console: Console) -> None:
    """Print where the masters are; nothing of a run without."""
    if host is None:
        return
    if host.memory_bytes:
        said = f"masters take {gb(host.memory_bytes)} of host memory"
    else:
        written = [f"{gb(host.written_per_switch)} are written at a switch"] if host.written_per_switch else []
        if host.written_in_run is not None:
            written.append(f"about {gb(host.written_in_run)} in the run, checkpoints apart")
        said = (
            f"masters are {gb(host.file_cache_bytes)} of files that are mapped, and take no host memory but the "
            f"system's file cache; their folder holds up to {gb(host.disk_bytes)}; {', '.join(written)}"
        ).rstrip("; ")
    console.print(said, highlight=False, soft_wrap=True)
