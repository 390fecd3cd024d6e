"""The files that a model was loaded from: where in them each parameter is, bit for bit, so that it can be mapped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lisa_kernels.ops.resting import TILE_ELEMENTS
from lisa_kernels.paging.tensor_file import DTYPES, MappedFile, Place, Stamp, header_of

# Linux's table of what a process has mapped.
MAPS = Path("/proc/self/maps")
BITS = {2: torch.int16, 4: torch.int32}


class Found(NamedTuple):
    """A parameter in a file: the place, what the file was when it was compared, and the tensor mapped from there."""

    place: Place
    stamp: Stamp
    mapped: Tensor


class _Mapping(NamedTuple):
    start: int
    stop: int
    offset: int
    path: str


class OwnFiles:
    """Looks for parameters in the folder that `model.config` names, and in the files that this process has mapped.

    Only what has the same dtype, shape and bits is found.
    """

    def __init__(self, model: nn.Module) -> None:
        self._names: dict[int, list[str]] = {}
        for name, param in model.named_parameters(remove_duplicate=False):
            self._names.setdefault(id(param), []).append(name)
        self._places = _places_in(getattr(getattr(model, "config", None), "_name_or_path", None))
        self._mappings = _mappings()
        self._files: dict[Path, tuple[MappedFile, Stamp]] = {}

    def names_of(self, param: nn.Parameter) -> list[str]:
        """Return the names that a parameter has in the model."""
        return self._names.get(id(param), [])

    def find(self, param: nn.Parameter) -> Found | None:
        """Return where a parameter is; None where it is in no such file as it is now."""
        if param.is_meta or not param.is_contiguous() or param.dtype not in DTYPES or not param.numel():
            return None
        for place in self._candidates(param):
            try:
                file, stamp = self._opened(place.path)
                mapped = file.tensor(place.offset, param.dtype, param.shape)
            except (OSError, ValueError):
                continue
            if _same_bits(param.detach(), mapped):
                return Found(place, stamp, mapped)
        return None

    def _candidates(self, param: nn.Parameter) -> Iterator[Place]:
        for name in self._names.get(id(param), ()):
            known = self._places.get((name, DTYPES[param.dtype], tuple(param.shape)))
            if known is not None:
                yield known
        start = param.data_ptr() if param.device.type == "cpu" else 0
        for mapping in self._mappings:
            if mapping.start <= start and start + param.nbytes <= mapping.stop:
                yield Place(Path(mapping.path), mapping.offset + start - mapping.start)

    def _opened(self, path: Path) -> tuple[MappedFile, Stamp]:
        if path not in self._files:
            stamp = Stamp.of(path)
            self._files[path] = MappedFile(path), stamp
        return self._files[path]


def _places_in(folder: object) -> dict[tuple[str, str, tuple[int, ...]], Place]:
    """Return by name, dtype and shape where the tensors of a folder's safetensors files are."""
    found: dict[tuple[str, str, tuple[int, ...]], Place] = {}
    if not isinstance(folder, str) or not folder or not Path(folder).is_dir():
        return found
    for path in sorted(Path(folder).absolute().glob("*.safetensors")):
        try:
            header, start = header_of(path)
            for name, entry in header.items():
                if name != "__metadata__":
                    key = name, str(entry["dtype"]), tuple(entry["shape"])
                    found[key] = Place(path, start + int(entry["data_offsets"][0]))
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            # No safetensors file, so nothing that this model was loaded from.
            continue
    return found


def _mappings() -> list[_Mapping]:
    """Return what this process has mapped from files and would keep to itself if it wrote there."""
    if not MAPS.exists():
        return []
    found = []
    for line in MAPS.read_text().splitlines():
        span, access, offset, _, inode, *path = line.split(maxsplit=5)
        if path and inode != "0" and access.endswith("p"):
            start, stop = (int(end, 16) for end in span.split("-"))
            found.append(_Mapping(start, stop, int(offset, 16), path[0]))
    return found


def _same_bits(weight: Tensor, mapped: Tensor) -> bool:
    """Return whether two tensors of one dtype and shape are the same to the bit; of one elsewhere a tile at a time."""
    bits = BITS[weight.element_size()]
    ours, theirs = weight.view(-1).view(bits), mapped.view(-1).view(bits)
    return all(
        torch.equal(one.cpu(), other) for one, other in zip(ours.split(TILE_ELEMENTS), theirs.split(TILE_ELEMENTS))
    )
