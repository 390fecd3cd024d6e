"""Which packages are installed beside the core, and the line that installs those that are missing."""

from __future__ import annotations

import importlib
import importlib.util
import re
from importlib import metadata

from lisa_kernels.errors import InputError


def is_installed(module: str) -> bool:
    """Return whether a module can be found; it is not imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def require(what: str, *modules: str, extra: str = "train") -> None:
    """Raise InputError unless `what` has the modules that it needs, as recent as the extra wants them."""
    lacking = [lack for lack in map(_lack, modules) if lack is not None]
    if lacking:
        raise InputError(f"{what} needs {', '.join(lacking)}: pip install 'lisa_kernels[{extra}]'")


def _lack(module: str) -> str | None:
    """Return what is wrong with a module; None if it is there and recent enough."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        inner = getattr(error, "name", None)
        # What is there may be broken by something that it needs itself.
        because = f" ({error})" if is_installed(module) and inner != module else ""
        return f"{module}, which is not installed{because}"
    least = _least(module)
    try:
        there = metadata.version(module)
    except metadata.PackageNotFoundError:
        return None
    if least is not None and _numbers(there) < _numbers(least):
        return f"{module} {least} or later, of which {there} is installed"
    return None


def _least(package: str) -> str | None:
    """Return the oldest version that the extras of this package take; None without its metadata."""
    try:
        wanted = metadata.requires("lisa_kernels") or []
    except metadata.PackageNotFoundError:
        return None
    found = (re.match(rf"{re.escape(package)}\s*>=\s*([\d.]+)", line) for line in wanted)
    return next((match[1] for match in found if match is not None), None)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])
